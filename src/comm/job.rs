//! A checked operation as strips of memory: which are added up or copied, and to where.
//!
//! A job is cut into blocks whose borders depend on the tensors' shape alone. Whoever computes a block computes
//! it the same way, so a result does not depend on how many threads took part or which call was used.

use std::ops::Range;

use super::dtype::DType;
use super::operation::{Layout, Operation, Pair};
use super::view::Tensor;

/// Elements of a block: enough to make what a block costs beside its bytes small.
pub(crate) const BLOCK: usize = 4096;

/// A column range of a tensor: the address of its first element and the bytes from row to row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Strip {
    data: usize,
    stride: usize,
}

/// Every output becomes the sum of all inputs, in their order. With one input that is a copy.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) dtype: DType,
    pub(crate) lines: usize,
    pub(crate) width: usize,
    pub(crate) inputs: Vec<Strip>,
    pub(crate) outputs: Vec<Strip>,
}

/// One block: a stretch of adjacent elements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Block {
    pub(crate) line: usize,
    pub(crate) start: usize,
    pub(crate) len: usize,
}

impl Strip {
    fn new(tensor: &Tensor, column: usize) -> Self {
        let size = tensor.dtype.size();
        Self { data: tensor.data + column * size, stride: tensor.row_stride.saturating_mul(size) }
    }

    /// The address of a block's first element.
    pub(crate) fn at(&self, block: Block, size: usize) -> usize {
        self.data + block.line * self.stride + block.start * size
    }
}

impl Job {
    fn new(tensors: &[(&Tensor, usize)], outputs: &[(&Tensor, usize)], width: usize) -> Option<Self> {
        let (shape, _) = outputs.first()?;
        let all = || tensors.iter().chain(outputs);
        let strips =
            |list: &[(&Tensor, usize)]| list.iter().map(|(tensor, at)| Strip::new(tensor, *at)).collect();
        // Rows that follow each other without gaps in every tensor are one long line.
        let joined = all().all(|(tensor, _)| tensor.is_dense() && tensor.columns == width);
        let (lines, width) = if joined { (1, shape.rows * width) } else { (shape.rows, width) };
        let inputs: Vec<_> = strips(tensors);
        let mut outputs: Vec<_> = strips(outputs);
        if let [only] = inputs.as_slice() {
            // What is its own copy needs none.
            outputs.retain(|output| output != only);
        }
        let moves = lines * width > 0 && !inputs.is_empty() && !outputs.is_empty();
        moves.then_some(Self { dtype: shape.dtype, lines, width, inputs, outputs })
    }

    /// Bytes read and written.
    pub(crate) fn bytes(&self) -> usize {
        self.lines * self.width * self.dtype.size() * (self.inputs.len() + self.outputs.len())
    }

    fn blocks_of_a_line(&self) -> usize {
        self.width.div_ceil(BLOCK)
    }

    /// The blocks that are left to `part` of `parts`.
    pub(crate) fn blocks(&self, part: usize, parts: usize) -> impl Iterator<Item = Block> + '_ {
        let count = self.lines * self.blocks_of_a_line();
        let Range { start, end } = count * part / parts..count * (part + 1) / parts;
        (start..end).map(|index| {
            let (line, start) = (index / self.blocks_of_a_line(), index % self.blocks_of_a_line() * BLOCK);
            Block { line, start, len: BLOCK.min(self.width - start) }
        })
    }
}

/// The jobs of a checked operation; none where nothing moves.
pub(crate) fn jobs(operation: &Operation<'_>, pairs: &[Pair]) -> Vec<Job> {
    let inputs = || pairs.iter().filter_map(Pair::gives).map(|tensor| (tensor, 0)).collect::<Vec<_>>();
    let outputs = || pairs.iter().filter_map(Pair::gets).map(|tensor| (tensor, 0)).collect::<Vec<_>>();
    match operation {
        Operation::Barrier => Vec::new(),
        Operation::AllReduce => {
            let outputs = outputs();
            let width = outputs.first().map_or(0, |(tensor, _)| tensor.columns);
            Job::new(&inputs(), &outputs, width).into_iter().collect()
        }
        Operation::Broadcast { root } => {
            let Some(source) = pairs.get(*root).and_then(Pair::gives) else { return Vec::new() };
            Job::new(&[(source, 0)], &outputs(), source.columns).into_iter().collect()
        }
        Operation::Gather { root, layout, .. } => {
            let target = pairs.get(*root).and_then(Pair::gets);
            side_by_side(layout, pairs, &target.into_iter().collect::<Vec<_>>())
        }
        Operation::AllGather { layout } => {
            side_by_side(layout, pairs, &pairs.iter().filter_map(Pair::gets).collect::<Vec<_>>())
        }
        Operation::ReduceScatter { layout } => {
            let full = inputs();
            let job = |(rank, pair): (usize, &Pair)| {
                let (start, end) = layout.columns(rank)?;
                let columns: Vec<_> = full.iter().map(|(tensor, _)| (*tensor, start)).collect();
                Job::new(&columns, &[(pair.gets()?, 0)], end - start)
            };
            pairs.iter().enumerate().filter_map(job).collect()
        }
        Operation::AddResidual { layout } => {
            let job = |(rank, pair): (usize, &Pair)| {
                let (start, end) = layout.columns(rank)?;
                let target = (pair.gets()?, 0);
                Job::new(&[target, (pair.gives()?, start)], &[target], end - start)
            };
            pairs.iter().enumerate().filter_map(job).collect()
        }
    }
}

/// Every rank's part into its columns of every target.
fn side_by_side(layout: &Layout<'_>, pairs: &[Pair], targets: &[&Tensor]) -> Vec<Job> {
    let mut covered = 0;
    let mut jobs = Vec::with_capacity(layout.split.0.len());
    for share in &layout.split.0 {
        let Some((first, end)) = layout.columns(share.rank) else { continue };
        // Where several ranks hold the same columns, the first one's are taken: two writers of one place
        // would race.
        let start = first.max(covered);
        covered = end;
        let Some(part) = pairs.get(share.rank).and_then(Pair::gives) else { continue };
        let outputs: Vec<_> = targets.iter().map(|target| (*target, start)).collect();
        jobs.extend(Job::new(&[(part, start - first)], &outputs, end - start));
    }
    jobs
}
