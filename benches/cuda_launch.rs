//! Host time of a list call between two ranks, beside two bare launches by `cuLaunchKernel`. The second rank is on the
//! second GPU where there is one.
//!
//! Prints one line of JSON: `cargo bench --features cuda-pin --bench cuda_launch`. benches/gpus puts the time of
//! the same call from Python beside it.

use std::ffi::{CStr, CString, c_void};
use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, sys};
use tp_rs::comm::{CommOptions, Communicator, DType, Device, Stream, Tensor};

const CALLS: usize = 100;
const ROUNDS: usize = 50;
const BYTES: usize = 16384;

/// Where one rank's work goes.
struct Side {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// Its tensor.
    memory: CudaSlice<u8>,
    function: sys::CUfunction,
}

impl Side {
    fn new(context: &Arc<CudaContext>, text: &CStr) -> Result<Self, Box<dyn std::error::Error>> {
        context.bind_to_thread()?;
        let stream = context.new_stream()?;
        let memory = stream.alloc_zeros::<u8>(BYTES)?;
        let (mut module, mut function) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: both are places for handles and the text ends with a NUL. The context is current.
        unsafe {
            sys::cuModuleLoadData(&raw mut module, text.as_ptr().cast()).result()?;
            sys::cuModuleGetFunction(&raw mut function, module, c"write_pattern".as_ptr()).result()?;
        }
        context.synchronize()?;
        Ok(Self { context: Arc::clone(context), stream, memory, function })
    }

    fn address(&self) -> u64 {
        self.memory.device_ptr(&self.stream).0
    }

    /// Launches a kernel that writes nothing. The context has to be current.
    fn launch(&self, mut place: u64) {
        let (mut words, mut seed) = (0_u32, 0_u32);
        let mut parameters: [*mut c_void; 3] =
            [(&raw mut place).cast(), (&raw mut words).cast(), (&raw mut seed).cast()];
        let null = std::ptr::null_mut();
        let stream = self.stream.cu_stream();
        // SAFETY: the kernel takes an address, a number of words and a seed.
        let code = unsafe {
            sys::cuLaunchKernel(self.function, 4, 1, 1, 512, 1, 1, 0, stream, parameters.as_mut_ptr(), null)
        };
        assert_eq!(code, sys::CUresult::CUDA_SUCCESS);
    }

    /// The same on a thread that goes from one device to the other.
    fn switch_and_launch(&self, place: u64) {
        // SAFETY: the context is retained.
        let code = unsafe { sys::cuCtxSetCurrent(self.context.cu_ctx()) };
        assert_eq!(code, sys::CUresult::CUDA_SUCCESS);
        self.launch(place);
    }
}

/// Microseconds a call, the least of all rounds: what is above it is other work of the machine.
fn least(sides: &[Side], mut call: impl FnMut()) -> Result<f64, Box<dyn std::error::Error>> {
    let mut least = f64::INFINITY;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for _ in 0..CALLS {
            call();
        }
        least = least.min(start.elapsed().as_secs_f64() * 1e6 / CALLS as f64);
        for side in sides {
            side.context.synchronize()?;
        }
    }
    Ok(least)
}

#[allow(clippy::print_stdout)] // Its purpose.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let count = tp_rs::device::cuda_devices()?.len();
    if count == 0 {
        println!("{{\"skipped\": \"no CUDA device\"}}");
        return Ok(());
    }
    let first = CudaContext::new(0)?;
    let apart = count > 1;
    let second = if apart { CudaContext::new(1)? } else { Arc::clone(&first) };
    let text = CString::new(include_str!("../cuda/tp_rs.ptx"))?;
    let sides = [Side::new(&first, &text)?, Side::new(&second, &text)?];
    let places = [sides[0].address(), sides[1].address()];
    let devices = [Device::Cuda(0), Device::Cuda(u32::from(apart))];
    let communicator = Communicator::new(&devices, &CommOptions::default())?;
    let mut tensors = Vec::new();
    for (place, device) in places.iter().zip(devices) {
        tensors.push(Tensor::dense(usize::try_from(*place)?, device, DType::F16, 1, BYTES / 2));
    }
    let own: Vec<_> = sides.iter().map(|side| Stream(side.stream.cu_stream().expose_provenance())).collect();
    let shared = vec![own[0]; 2];
    let reduce = |streams: &[Stream]| {
        // SAFETY: the memory lives until the end, and only these calls touch it.
        let done = unsafe { communicator.all_reduce(&tensors, streams) };
        assert!(done.is_ok(), "{done:?}");
    };
    let launch_both = || {
        for (side, place) in sides.iter().zip(places) {
            if apart { side.switch_and_launch(place) } else { side.launch(place) }
        }
    };

    for _ in 0..2 {
        least(&sides, launch_both)?;
        least(&sides, || reduce(&own))?;
    }
    let two_bare = least(&sides, launch_both)?;
    first.bind_to_thread()?;
    let one_bare = least(&sides, || sides[0].launch(places[0]))?;
    let two_streams = least(&sides, || reduce(&own))?;
    // Ranks of one device may share a stream, and then share a launch.
    let one_stream = if apart { None } else { Some(least(&sides, || reduce(&shared))?) };
    let one_stream =
        one_stream.map_or_else(String::new, |us| format!(", \"all_reduce_one_stream_us\": {us:.2}"));
    println!(
        "{{\"devices\": {}, \"two_bare_launches_us\": {two_bare:.2}, \"one_bare_launch_us\": {one_bare:.2}, \
         \"all_reduce_two_streams_us\": {two_streams:.2}{one_stream}}}",
        1 + u32::from(apart)
    );
    Ok(())
}
