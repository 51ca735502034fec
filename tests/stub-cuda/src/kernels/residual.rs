//! `add_residual`: adds to a target its columns of a source. Ranks do not meet.

use super::eye::Eye;
use super::numbers::Sum;
use crate::codes::Result;
use crate::dtype::DType;
use crate::layout::Call;

pub(super) fn run(device: u32, call: &Call, dtype: DType) -> Result {
    let eye = Eye(device);
    let size = dtype.size() as u64;
    let [member, ..] = call.members;
    let ([begin, ..], [end, ..]) = (call.begin, call.end);
    let mut line = vec![0; (u64::from(end.saturating_sub(begin)) * size) as usize];
    for row in 0..call.rows {
        let target = member.output + row * member.output_stride * size;
        let source = member.input + (row * member.input_stride + u64::from(begin)) * size;
        let mut sum = Sum::new(dtype);
        for at in [target, source] {
            eye.read(at, &mut line, size)?;
            sum.add(&line);
        }
        sum.round(&mut line);
        eye.write(target, &line, size)?;
    }
    Ok(())
}
