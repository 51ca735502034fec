//! Two ranks of one GPU add their vectors up, from plain Rust.
//!
//! ```console
//! $ cargo run --example two_ranks --features cuda-pin
//! ```

use cudarc::driver::{CudaContext, DevicePtr};
use tp_rs::comm::{CommOptions, Communicator, DType, Device, Stream, Tensor};

#[allow(clippy::print_stdout)] // Its purpose.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    if tp_rs::device::cuda_devices()?.is_empty() {
        println!("no CUDA device here; the same calls work with Device::Cpu");
        return Ok(());
    }
    // Any library that uses the device's primary context will do: candle, mistral.rs, torch, or cudarc by itself.
    let context = CudaContext::new(0)?;
    let streams = [context.new_stream()?, context.new_stream()?];
    let vectors = [streams[0].clone_htod(&[1.0_f32; 5])?, streams[1].clone_htod(&[2.0_f32; 5])?];

    let device = Device::Cuda(0);
    let communicator = Communicator::new(&[device, device], &CommOptions::default())?;
    let mut tensors = Vec::new();
    let mut queues = Vec::new();
    for (vector, stream) in vectors.iter().zip(&streams) {
        let (address, _held) = vector.device_ptr(stream);
        tensors.push(Tensor::dense(usize::try_from(address)?, device, DType::F32, 1, 5));
        queues.push(Stream(stream.cu_stream().expose_provenance()));
    }
    // SAFETY: the vectors live until the streams are waited for, and nobody else touches them before.
    unsafe { communicator.all_reduce(&tensors, &queues)? };
    communicator.wait(&queues)?;

    for (rank, (vector, stream)) in vectors.iter().zip(&streams).enumerate() {
        println!("rank {rank}: {:?}", stream.clone_dtoh(vector)?);
    }
    Ok(())
}
