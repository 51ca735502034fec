//! Which tensors a linear layer is stored as, and where each of them may be cut.
//!
//! Sources: `AutoGPTQ`'s and `AutoAWQ`'s `WQLinear` layouts, the float8 blocks of DeepSeek-V3, OCP microscaling formats
//! (mxfp4) as gpt-oss stores them, ggml's block types, and the tensors of EXL2.

use crate::model::roles::geometry::{Rule, Segment, Side};
use crate::model::roles::names::{Leaf, Name, Size};
use crate::model::{CutAlong, Part, Quantization, RawTensor, Role};

/// How one tensor is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Holding {
    /// Its role.
    pub(crate) role: Role,
    /// Its parts; their bytes add up to the tensor's.
    pub(crate) parts: Vec<Part>,
}

impl Holding {
    /// The whole tensor in one part that is not cut.
    pub(crate) fn whole(role: Role, along: CutAlong, bytes: u64) -> Self {
        Self { role, parts: vec![Part { along, bytes, grid: 1 }] }
    }
}

/// EXL2 kernels take columns 32 at a time, and its files pad outputs to that.
const EXL2_COLUMNS: u64 = 32;
/// Elements of an mxfp4 block, which share a scale.
const MXFP4_BLOCK: u64 = 32;

/// Lengths of a module as its main tensor tells them, `None` for tensors that do not.
pub(crate) fn size(name: &Name, raw: &RawTensor, quantization: &Quantization) -> Option<Size> {
    let shape = raw.shape.as_slice();
    let (outputs, inputs) = match (name.leaf, shape) {
        (Leaf::Weight, [outputs, inputs]) if !is_packed_bytes(raw) => (Some(*outputs), Some(*inputs)),
        (Leaf::PackedWeight, [rows, columns]) => match quantization {
            Quantization::Gptq { bits, .. } if *bits > 0 => {
                (Some(*columns), rows.checked_mul(32).map(|words| words / bits))
            }
            Quantization::Awq { bits, .. } if *bits > 0 => {
                (columns.checked_mul(32).map(|words| words / bits), Some(*rows))
            }
            _ => return None,
        },
        (Leaf::ExlWeight, [_, columns]) => (Some(*columns), None),
        _ => return None,
    };
    Some(Size { outputs, inputs })
}

/// Whether an integer type hides several elements a byte behind the name `weight` (bitsandbytes).
fn is_packed_bytes(raw: &RawTensor) -> bool {
    matches!(raw.dtype.as_str(), "U8" | "I8" | "I32" | "U32")
}

fn is_float(raw: &RawTensor) -> bool {
    matches!(raw.dtype.as_str(), "BF16" | "F16" | "F32" | "F64")
}

/// Holds one tensor of a linear layer by the first rule whose shape it has.
///
/// # Errors
/// The reason why the layer is held whole: a shape that the geometry does not explain, or a grid that no cut can keep.
pub(crate) fn hold(
    rules: &[Rule],
    name: &Name,
    raw: &RawTensor,
    dimensions_head: u64,
    quantization: &Quantization,
) -> Result<Holding, String> {
    let mut wanted = Vec::new();
    for rule in rules {
        let layout = layout(rule, name, raw, quantization)?;
        if layout.shapes.iter().any(|shape| fits(shape, &raw.shape)) {
            return parts(rule, &layout, raw, dimensions_head);
        }
        wanted.extend(layout.shapes.iter().map(|shape| show(shape)));
    }
    wanted.dedup();
    Err(format!("its shape is {:?}, wanted {}", raw.shape, wanted.join(" or ")))
}

/// How one tensor of a rule's linear layer is stored.
struct Layout {
    /// Shapes that it may have; `None` for a length that is not known.
    shapes: Vec<Vec<Option<u64>>>,
    /// Elements between two places where the cut side may be cut.
    grid: u64,
    /// Whether a cut divides it; a tensor that is not is kept by every rank that has a part of the layer.
    divided: bool,
    /// Whether it is kept whole by every rank, as a bias after the sum over ranks.
    after_sum: bool,
}

impl Layout {
    fn new(shapes: Vec<Vec<Option<u64>>>, grid: u64, divided: bool) -> Self {
        Self { shapes, grid, divided, after_sum: false }
    }
}

fn layout(rule: &Rule, name: &Name, raw: &RawTensor, quantization: &Quantization) -> Result<Layout, String> {
    let Size { outputs, inputs } = rule.size();
    let output_side = rule.side == Side::Output;
    let stacked = |shape: &[Option<u64>]| {
        rule.stack.into_iter().map(Some).chain(shape.iter().copied()).collect::<Vec<_>>()
    };
    let up = |length: Option<u64>, unit: u64| length.map(|n| n.div_ceil(unit.max(1)));
    match name.leaf {
        Leaf::Weight if rule.other.is_none() && rule.stack.is_none() && raw.shape.len() != 2 => {
            // Sinks, and stacks of one matrix a head.
            let mut shape = vec![rule.total()];
            shape.resize(raw.shape.len().max(1), None);
            Ok(Layout::new(vec![shape], 1, true))
        }
        Leaf::Weight => {
            let mut shapes = vec![stacked(&[outputs, inputs])];
            if name.may_be_transposed {
                shapes.push(stacked(&[inputs, outputs]));
            }
            let grid =
                match quantization {
                    Quantization::Fp8Block { rows, columns } if raw.dtype.starts_with("F8") => {
                        if output_side { *rows } else { *columns }
                    }
                    _ if raw.block > 1 => {
                        if output_side {
                            1
                        } else {
                            raw.block
                        }
                    }
                    Quantization::Other { name } if !is_float(raw) => {
                        return Err(format!("quantised by {name}, whose cuts are not known"));
                    }
                    _ => 1,
                };
            Ok(Layout::new(shapes, grid, true))
        }
        // Added once, after the sum over ranks.
        Leaf::Bias if !output_side => {
            Ok(Layout { after_sum: true, ..Layout::new(vec![stacked(&[outputs])], 1, false) })
        }
        Leaf::Bias => Ok(Layout::new(vec![stacked(&[outputs])], 1, true)),
        Leaf::BlockScales => match quantization {
            Quantization::Fp8Block { rows, columns } => {
                let grid = if output_side { *rows } else { *columns };
                let (outputs, inputs) = (up(outputs, *rows), up(inputs, *columns));
                let mut shapes = vec![stacked(&[outputs, inputs])];
                if rule.stack.is_some() {
                    shapes.push(stacked(&[inputs, outputs]));
                }
                Ok(Layout::new(shapes, grid, true))
            }
            other => Err(format!("scales of float8 blocks in a checkpoint quantised by {}", method(other))),
        },
        Leaf::PackedWeight | Leaf::PackedZeros | Leaf::Scales | Leaf::GroupIndex if rule.stack.is_none() => {
            packed(rule, name.leaf, quantization)
        }
        Leaf::Blocks | Leaf::Scales => {
            let blocks = up(inputs, MXFP4_BLOCK);
            let mut shape = vec![outputs, blocks];
            if name.leaf == Leaf::Blocks {
                shape.push(Some(MXFP4_BLOCK / 2));
            }
            Ok(Layout::new(vec![stacked(&shape)], if output_side { 1 } else { MXFP4_BLOCK }, true))
        }
        Leaf::ExlWeight | Leaf::ExlScale => {
            // ExlLamaV2 divides the outputs of every layer and never its inputs: the share is that of the heads or
            // columns, counted in outputs.
            let padded = up(outputs, EXL2_COLUMNS).and_then(|n| n.checked_mul(EXL2_COLUMNS));
            let columns = if name.leaf == Leaf::ExlScale { padded.map(|n| n / 8) } else { padded };
            Ok(Layout::new(vec![vec![None, columns]], EXL2_COLUMNS, true))
        }
        Leaf::ExlWhole => Ok(Layout::new(vec![vec![None; raw.shape.len()]], 1, false)),
        Leaf::PackedWeight | Leaf::PackedZeros | Leaf::GroupIndex | Leaf::Other => {
            Err(format!("{} keeps it in a layout whose cuts are not known", method(quantization)))
        }
    }
}

/// GPTQ and AWQ.
fn packed(rule: &Rule, leaf: Leaf, quantization: &Quantization) -> Result<Layout, String> {
    let Size { outputs, inputs } = rule.size();
    let output_side = rule.side == Side::Output;
    let (bits, group_size, gptq) = match quantization {
        Quantization::Gptq { bits, group_size, act_order } => {
            if *act_order && !output_side {
                return Err(
                    "GPTQ reordered its inputs (desc_act), so a run of inputs is spread over all groups; \
                            only its outputs could be cut"
                        .to_owned(),
                );
            }
            (*bits, *group_size, true)
        }
        Quantization::Awq { bits, group_size } => (*bits, *group_size, false),
        other => return Err(format!("{} keeps it in a layout whose cuts are not known", method(other))),
    };
    if bits == 0 || bits > 32 {
        return Err(format!("{bits} bits an element, wanted 1 to 32"));
    }
    // Elements after which a pack ends on the border of a 32-bit word.
    let pack = 32 / gcd(32, bits);
    let words = |length: Option<u64>| length.and_then(|n| n.checked_mul(bits)).map(|n| n.div_ceil(32));
    let one_group = group_size == 0 || inputs.is_some_and(|n| group_size >= n);
    let groups = if group_size == 0 { Some(1) } else { inputs.map(|n| n.div_ceil(group_size)) };
    let grid = match (output_side, gptq) {
        (true, _) => pack,
        (false, true) if one_group => pack,
        (false, false) if one_group => 1,
        (false, true) => lcm(pack, group_size),
        (false, false) => group_size,
    };
    let (shape, divided) = match leaf {
        Leaf::PackedWeight if gptq => (vec![words(inputs), outputs], true),
        Leaf::PackedWeight => (vec![inputs, words(outputs)], true),
        Leaf::PackedZeros => (vec![groups, words(outputs)], output_side || !one_group),
        Leaf::Scales => (vec![groups, outputs], output_side || !one_group),
        _ => (vec![inputs], !output_side),
    };
    Ok(Layout::new(vec![shape], grid, divided))
}

fn parts(rule: &Rule, layout: &Layout, raw: &RawTensor, head_dim: u64) -> Result<Holding, String> {
    let grid = layout.grid.max(1);
    let runs: Vec<&Segment> = rule.segments.iter().collect();
    let several = runs.len() > 1 || runs.iter().any(|s| s.copies > 1);
    if grid > 1 && several {
        let off = runs
            .iter()
            .find(|s| if rule.interleaved { s.per_unit % grid != 0 } else { s.elements % grid != 0 });
        if let Some(run) = off {
            return Err(format!(
                "a fused part of {} elements does not end on a multiple of {grid}, where its blocks do",
                if rule.interleaved { run.per_unit } else { run.elements }
            ));
        }
    }
    if layout.after_sum {
        return Ok(Holding::whole(Role::Replicated, CutAlong::Whole, raw.bytes));
    }
    if !layout.divided {
        let holder = if rule.whole == CutAlong::Whole { Role::Replicated } else { rule.role };
        return Ok(Holding::whole(holder, rule.whole, raw.bytes));
    }
    let total = rule.total().unwrap_or(0);
    let mut parts: Vec<Part> = Vec::new();
    let (mut before, mut given) = (0_u64, 0_u64);
    for run in runs {
        before = before.saturating_add(run.elements.saturating_mul(run.copies));
        let end = share(raw.bytes, before, total);
        let part = Part { along: run.along, bytes: end - given, grid: head_grid(grid, run, head_dim) };
        given = end;
        match parts.last_mut() {
            Some(last) if last.along == part.along => {
                last.bytes += part.bytes;
                last.grid = lcm(last.grid, part.grid);
            }
            _ => parts.push(part),
        }
    }
    Ok(Holding { role: rule.role, parts })
}

/// A grid of a run whose heads have another length than the model's, in elements of the model's heads, so that it
/// asks for the same number of whole heads.
fn head_grid(grid: u64, run: &Segment, head_dim: u64) -> u64 {
    if !matches!(run.along, CutAlong::QueryHeads | CutAlong::KvHeads) || run.per_unit == head_dim {
        return grid;
    }
    match grid / gcd(grid, run.per_unit) {
        0 | 1 => 1,
        heads => heads.saturating_mul(head_dim),
    }
}

/// `bytes * part / total`, and all of them for the last part.
fn share(bytes: u64, part: u64, total: u64) -> u64 {
    if part >= total {
        return bytes;
    }
    u64::try_from(u128::from(bytes) * u128::from(part) / u128::from(total)).unwrap_or(bytes)
}

fn fits(wanted: &[Option<u64>], got: &[u64]) -> bool {
    wanted.len() == got.len() && wanted.iter().zip(got).all(|(w, g)| w.is_none_or(|w| w == *g))
}

fn show(shape: &[Option<u64>]) -> String {
    let lengths: Vec<String> =
        shape.iter().map(|n| n.map_or_else(|| "any".to_owned(), |n| n.to_string())).collect();
    format!("[{}]", lengths.join(", "))
}

/// The method's name as people write it.
pub(crate) fn method(quantization: &Quantization) -> &str {
    match quantization {
        Quantization::None => "nothing",
        Quantization::Gptq { .. } => "GPTQ",
        Quantization::Awq { .. } => "AWQ",
        Quantization::Fp8Block { .. } => "float8 blocks",
        Quantization::Gguf => "GGUF",
        Quantization::Exl2 => "EXL2",
        Quantization::Other { name } => name,
    }
}

pub(crate) fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn lcm(a: u64, b: u64) -> u64 {
    if a == 0 || b == 0 { a.max(b).max(1) } else { (a / gcd(a, b)).saturating_mul(b) }
}
