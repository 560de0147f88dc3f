//! Where each output element of an operation looks.

/// For `mean(dims)` over a value of this shape (batch included): the output element of each input element, and how many
/// input elements an output element has.
pub fn mean_targets(shape: &[usize], dims: &[i64]) -> (Vec<usize>, usize) {
    let rank = shape.len() as i64;
    let averaged = |axis: usize| dims.iter().any(|&d| (d + rank) % rank == axis as i64);
    let mut targets = vec![0];
    let mut count = 1;
    for (axis, &size) in shape.iter().enumerate().skip(1) {
        let grows = !averaged(axis);
        if !grows {
            count *= size;
        }
        targets = targets.iter().flat_map(|&t| (0..size).map(move |i| if grows { t * size + i } else { t })).collect();
    }
    (targets, count)
}

/// The element of `shape` that each element of `out` reads, both without the batch; `None` where they are the same.
pub fn broadcast_map(shape: &[usize], out: &[usize]) -> Option<Vec<usize>> {
    if shape == out {
        return None;
    }
    let mut map = vec![0];
    for (&size, &of) in shape.iter().zip(out) {
        map = map.iter().flat_map(|&m| (0..of).map(move |i| m * size + if size == 1 { 0 } else { i })).collect();
    }
    Some(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_per_channel_reads_one_element_per_plane() {
        assert_eq!(broadcast_map(&[2, 1, 1], &[2, 1, 3]), Some(vec![0, 0, 0, 1, 1, 1]));
        assert_eq!(broadcast_map(&[2, 3], &[2, 3]), None);
    }

    #[test]
    fn mean_over_the_plane() {
        assert_eq!(mean_targets(&[9, 2, 1, 3], &[-1, 2]), (vec![0, 0, 0, 1, 1, 1], 3));
        assert_eq!(mean_targets(&[9, 2, 2], &[1]), (vec![0, 1, 0, 1], 2));
    }
}
