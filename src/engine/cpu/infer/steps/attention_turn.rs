//! Queries and keys turned by the position of their token: pairs of channels, as if they were planes (Su et al., "RoFormer:
//! Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864).

use crate::engine::cpu::common::kernels::lanes::{LANES, Lanes};

/// `x * table[0] + partner(x) * table[1]`, both `[token][channel of a head]`.
#[derive(Debug, Clone, Copy)]
pub struct Turn {
    /// Where the tables begin in the weights, and the floats of both.
    pub table: usize,
    pub len: usize,
    /// So many tokens are left as they are.
    pub first: usize,
    /// A channel's partner is half a head away, else it is its neighbour.
    pub half: bool,
}

impl Turn {
    /// Sixteen channels of a token.
    ///
    /// # Safety
    /// `blocks` blocks of a head begin at `from`, `plane` apart, with `token` in each; the tables, at `table`, have it too.
    #[inline(always)]
    pub unsafe fn turned<V: Lanes>(
        &self,
        from: *const f32,
        plane: usize,
        [block, blocks]: [usize; 2],
        token: usize,
        table: *const f32,
    ) -> V {
        let from = from.wrapping_add(token * LANES);
        // SAFETY: the caller's promise. Half of a head's channels is a multiple of eight.
        unsafe {
            let x = V::load(from.add(block * plane));
            let Some(row) = token.checked_sub(self.first) else { return x };
            let depth = blocks * LANES;
            let partner = if self.half {
                let eight = |lane: usize| {
                    let channel = (block * LANES + lane + depth / 2) % depth;
                    from.add(channel / LANES * plane + channel % LANES)
                };
                V::load_halves(eight(0), eight(8))
            } else {
                x.spread(V::from_array(NEIGHBOURS))
            };
            let at = table.add(row * depth + block * LANES);
            partner.mul_add(V::load(at.add(self.len / 2)), x.mul(V::load(at)))
        }
    }
}

/// The number of each lane's neighbour, in the bits of a float.
const NEIGHBOURS: [f32; LANES] = {
    let mut order = [0.0; LANES];
    let mut lane = 0;
    while lane < LANES {
        order[lane] = f32::from_bits((lane ^ 1) as u32);
        lane += 1;
    }
    order
};
