//! Host time of a list call between two ranks of one GPU, beside two bare launches through the same driver calls.
//!
//! Prints one line of JSON: `cargo bench --features cuda-pin --bench cuda_launch`. benches/gpus puts the time of
//! the same call from Python beside it.

use std::ffi::{CString, c_void};
use std::time::Instant;

use cudarc::driver::CudaContext;
use cudarc::driver::sys;
use tp_rs::comm::{CommOptions, Communicator, DType, Device, Stream, Tensor};

const CALLS: usize = 100;
const ROUNDS: usize = 50;

/// Microseconds a call, the least of all rounds: what is above it is other work of the machine.
fn least(context: &CudaContext, mut call: impl FnMut()) -> Result<f64, Box<dyn std::error::Error>> {
    let mut least = f64::INFINITY;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for _ in 0..CALLS {
            call();
        }
        least = least.min(start.elapsed().as_secs_f64() * 1e6 / CALLS as f64);
        context.synchronize()?;
    }
    Ok(least)
}

#[allow(clippy::print_stdout)] // Its purpose.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    if tp_rs::device::cuda_devices()?.is_empty() {
        println!("{{\"skipped\": \"no CUDA device\"}}");
        return Ok(());
    }
    let context = CudaContext::new(0)?;
    let streams = [context.new_stream()?, context.new_stream()?];
    let memory = streams[0].alloc_zeros::<u8>(2 * 16384)?;
    context.synchronize()?;
    let (base, _held) = cudarc::driver::DevicePtr::device_ptr(&memory, &streams[0]);

    let text = CString::new(include_str!("../cuda/tp_rs.ptx"))?;
    let (mut module, mut function) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: both are places for handles and the text ends with a NUL. The kernel writes no words.
    unsafe {
        sys::cuModuleLoadData(&raw mut module, text.as_ptr().cast()).result()?;
        sys::cuModuleGetFunction(&raw mut function, module, c"write_pattern".as_ptr()).result()?;
    }
    let launch = |stream: usize| {
        let (mut place, mut words, mut seed) = (base, 0_u32, 0_u32);
        let mut parameters: [*mut c_void; 3] =
            [(&raw mut place).cast(), (&raw mut words).cast(), (&raw mut seed).cast()];
        let null = std::ptr::null_mut();
        let stream = streams[stream].cu_stream();
        // SAFETY: the kernel takes an address, a number of words and a seed.
        let code = unsafe {
            sys::cuLaunchKernel(function, 4, 1, 1, 512, 1, 1, 0, stream, parameters.as_mut_ptr(), null)
        };
        assert_eq!(code, sys::CUresult::CUDA_SUCCESS);
    };
    let device = Device::Cuda(0);
    let communicator = Communicator::new(&[device, device], &CommOptions::default())?;
    let base = usize::try_from(base)?;
    let at = |rank: usize| base + rank * 16384;
    let tensors: Vec<_> = (0..2).map(|rank| Tensor::dense(at(rank), device, DType::F16, 1, 8192)).collect();
    let own: Vec<_> = streams.iter().map(|stream| Stream(stream.cu_stream().expose_provenance())).collect();
    let shared = vec![own[0]; 2];
    let reduce = |streams: &[Stream]| {
        // SAFETY: the memory lives until the end, and only these calls touch it.
        let done = unsafe { communicator.all_reduce(&tensors, streams) };
        assert!(done.is_ok(), "{done:?}");
    };

    for _ in 0..2 {
        least(&context, || (0..2).for_each(launch))?;
        least(&context, || reduce(&own))?;
    }
    let two_bare = least(&context, || (0..2).for_each(launch))?;
    let one_bare = least(&context, || launch(0))?;
    let two_streams = least(&context, || reduce(&own))?;
    let one_stream = least(&context, || reduce(&shared))?;
    println!(
        "{{\"two_bare_launches_us\": {two_bare:.2}, \"one_bare_launch_us\": {one_bare:.2}, \
         \"all_reduce_two_streams_us\": {two_streams:.2}, \"all_reduce_one_stream_us\": {one_stream:.2}}}"
    );
    Ok(())
}
