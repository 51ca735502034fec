//! Tensor infos, and whether the tensors lie where ggml wants them.

use std::io::BufRead;

use super::input::Input;
use super::types::TensorType;
use crate::error::Result;
use crate::model::RawTensor;
use crate::model::header::quoted;

/// The shortest tensor info: a name's length, the number of dimensions, a type, an offset.
pub(super) const SHORTEST_INFO: u64 = 24;
/// Most dimensions of a tensor (`GGML_MAX_DIMS`).
const MAX_DIMENSIONS: u32 = 4;
/// Longest name that is read. ggml allows 63 bytes.
const MAX_NAME: u64 = 65_535;
/// Bytes of a tensor in memory, its name not counted: the [`RawTensor`] (88) and its place (32), each up to three
/// times while a vector grows, its shape and type (48), and its name in the search for doubles (16).
const TENSOR_BYTES: u64 = 424;

/// Where a tensor's bytes are, counted from the first tensor's.
#[derive(Clone, Copy)]
struct Place {
    offset: u64,
    bytes: u64,
    tensor: usize,
}

/// The tensors of a file whose next bytes are `count` infos.
pub(super) fn tensors(
    input: &mut Input<'_, impl BufRead>,
    count: u64,
    alignment: u64,
) -> Result<Vec<RawTensor>> {
    let mut tensors = Vec::new();
    let mut places = Vec::new();
    for number in 0..count {
        let name = input.name(MAX_NAME, format_args!("the name of tensor {number}"))?;
        input.hold(TENSOR_BYTES, format_args!("tensor {number}"))?;
        let tensor = info(input, name)?;
        let offset = input.u64(format_args!("the offset of tensor {}", quoted(&tensor.name)))?;
        if offset % alignment != 0 {
            return Err(input.fail(format!(
                "tensor {} starts at byte {offset} of the tensors, {} bytes past a multiple of the alignment of \
                 {alignment}; download it again",
                quoted(&tensor.name),
                offset % alignment
            )));
        }
        places.push(Place { offset, bytes: tensor.bytes, tensor: tensors.len() });
        tensors.push(tensor);
    }
    check_names(input, &tensors)?;
    check_places(input, &tensors, places, alignment)?;
    Ok(tensors)
}

/// Shape and type of the tensor `name`.
fn info(input: &mut Input<'_, impl BufRead>, name: String) -> Result<RawTensor> {
    let dimensions = input.u32(format_args!("the dimensions of tensor {}", quoted(&name)))?;
    if dimensions > MAX_DIMENSIONS {
        return Err(input.fail(format!(
            "tensor {} has {dimensions} dimensions and ggml has {MAX_DIMENSIONS} at most; download it again",
            quoted(&name)
        )));
    }
    let mut shape = Vec::with_capacity(MAX_DIMENSIONS as usize);
    for _ in 0..dimensions {
        shape.push(input.u64(format_args!("the shape of tensor {}", quoted(&name)))?);
    }
    let id = input.u32(format_args!("the type of tensor {}", quoted(&name)))?;
    let Some(kind) = TensorType::of(id) else {
        let problem = if TensorType::is_withdrawn(id) {
            format!("the type {id}, which ggml has removed; quantise the model again")
        } else {
            format!("the unknown type {id}; download it again, or a newer tp_rs may know it")
        };
        return Err(input.fail(format!("tensor {} has {problem}", quoted(&name))));
    };
    // The innermost dimension comes first in the file. A tensor without dimensions is one number.
    let row = shape.first().copied().unwrap_or(1);
    shape.reverse();
    if row % kind.block != 0 {
        return Err(input.fail(format!(
            "tensor {} has rows of {row} elements, no multiple of the {} that share a block of {}; download it again",
            quoted(&name),
            kind.block,
            kind.name
        )));
    }
    let bytes = shape
        .iter()
        .try_fold(1_u64, |elements, &dimension| elements.checked_mul(dimension))
        .and_then(|elements| (elements / kind.block).checked_mul(kind.bytes))
        .ok_or_else(|| {
            input.fail(format!(
                "tensor {} of shape {shape:?} and type {} has more bytes than 64 bits can count; download it again",
                quoted(&name),
                kind.name
            ))
        })?;
    Ok(RawTensor { name, dtype: kind.name.to_owned(), shape, bytes, block: kind.block })
}

fn check_names(input: &Input<'_, impl BufRead>, tensors: &[RawTensor]) -> Result<()> {
    let mut names: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    names.sort_unstable();
    for (name, next) in names.iter().zip(names.iter().skip(1)) {
        if name == next {
            let problem = format!("two tensors have the name {}; convert the model again", quoted(name));
            return Err(input.fail(problem));
        }
    }
    Ok(())
}

/// Checks that tensors follow each other, each at the next multiple of the alignment, as ggml demands, and that the
/// file has them all.
fn check_places(
    input: &Input<'_, impl BufRead>,
    tensors: &[RawTensor],
    mut places: Vec<Place>,
    alignment: u64,
) -> Result<()> {
    // An empty tensor comes before the one that it shares its offset with.
    places.sort_unstable_by_key(|place| (place.offset, place.bytes, place.tensor));
    let name = |place: &Place| quoted(tensors.get(place.tensor).map_or("", |tensor| tensor.name.as_str()));
    let overflow =
        |place: &Place| input.fail(format!("tensor {} ends beyond 64 bits; download it again", name(place)));
    let mut previous: Option<&Place> = None;
    let mut expected = 0_u64;
    let mut end = 0_u64;
    for place in &places {
        if place.offset < expected {
            let problem = match previous {
                Some(previous) if place.offset < end => {
                    format!("overlaps tensor {} by {} bytes", name(previous), end - place.offset)
                }
                _ => format!("starts before the next multiple of {alignment} after its neighbour"),
            };
            return Err(input.fail(format!(
                "tensor {} at byte {} of the tensors {problem}; download it again",
                name(place),
                place.offset
            )));
        }
        if place.offset > expected {
            return Err(input.fail(format!(
                "tensor {} at byte {} of the tensors leaves a hole of {} bytes; download it again",
                name(place),
                place.offset,
                place.offset - expected
            )));
        }
        end = place.offset.checked_add(place.bytes).ok_or_else(|| overflow(place))?;
        expected = end.checked_next_multiple_of(alignment).ok_or_else(|| overflow(place))?;
        previous = Some(place);
    }
    // Empty tensors need no room, nor the padding in front of it.
    let Some(last) = previous.filter(|_| end > 0) else { return Ok(()) };
    let file_end = input
        .position()
        .checked_next_multiple_of(alignment)
        .and_then(|start| start.checked_add(end))
        .ok_or_else(|| overflow(last))?;
    if file_end > input.length() {
        return Err(input.fail(format!(
            "its tensors end at byte {file_end} with {}, and the file at byte {}: {} bytes are missing; download it \
             again",
            name(last),
            input.length(),
            file_end - input.length()
        )));
    }
    Ok(())
}
