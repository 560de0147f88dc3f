//! `C = A B` and `C += A B` on strided views.

/// A matrix inside a slice: element (i, j) is at `i * rows + j * columns`.
#[derive(Clone, Copy)]
pub struct View<'a> {
    pub data: &'a [f32],
    /// Distance between rows.
    pub rows: usize,
    /// Distance between columns.
    pub columns: usize,
}

impl<'a> View<'a> {
    /// Rows of length `row` one after the other.
    pub fn new(data: &'a [f32], row: usize) -> Self {
        Self { data, rows: row, columns: 1 }
    }

    pub fn transposed(self) -> Self {
        Self { rows: self.columns, columns: self.rows, ..self }
    }

    fn fits(self, m: usize, n: usize) -> bool {
        (m - 1) * self.rows + (n - 1) * self.columns < self.data.len()
    }
}

/// `c (m x n, row stride ldc) = a (m x k) b (k x n)`, added to what is there with `add`.
pub fn matmul([m, n, k]: [usize; 3], c: &mut [f32], ldc: usize, a: View<'_>, b: View<'_>, add: bool) {
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * ldc + n <= c.len(), "matmul: the result does not fit");
    if k == 0 {
        if !add {
            (0..m).for_each(|i| c[i * ldc..i * ldc + n].fill(0.0));
        }
        return;
    }
    assert!(a.fits(m, k) && b.fits(k, n), "matmul: a view reaches outside its slice");
    // SAFETY: the three asserts keep every element inside its slice, and `c` is borrowed mutably, so nothing aliases it.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            ldc as isize,
            add,
            a.data.as_ptr(),
            a.columns as isize,
            a.rows as isize,
            b.data.as_ptr(),
            b.columns as isize,
            b.rows as isize,
            1.0f32,
            1.0f32,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn like_three_loops_for_every_transposition() {
        let (m, n, k) = (7, 19, 11);
        let fill = |len: usize, s: f32| (0..len).map(|i| ((i * 37 % 23) as f32 - 11.0) * s).collect::<Vec<_>>();
        let (a, b) = (fill(m * k, 0.5), fill(k * n, 0.25));
        for (ta, tb, add) in [(false, false, false), (true, false, true), (false, true, true), (true, true, false)] {
            let va = if ta { View::new(&a, m).transposed() } else { View::new(&a, k) };
            let vb = if tb { View::new(&b, k).transposed() } else { View::new(&b, n) };
            let mut c = vec![1.0f32; m * (n + 3)];
            matmul([m, n, k], &mut c, n + 3, va, vb, add);
            for i in 0..m {
                for j in 0..n {
                    let at = |v: View<'_>, i: usize, j: usize| v.data[i * v.rows + j * v.columns];
                    let exact: f32 =
                        (0..k).map(|l| at(va, i, l) * at(vb, l, j)).sum::<f32>() + f32::from(u8::from(add));
                    // Products of multiples of 1/8 below 2^24: every order of adding is exact.
                    assert_eq!(c[i * (n + 3) + j], exact);
                }
                assert_eq!(c[i * (n + 3) + n..(i + 1) * (n + 3)], [1.0; 3]);
            }
        }
    }
}
