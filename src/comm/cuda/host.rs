//! List calls on CUDA ranks, and what they do with tensors in host memory.

use std::ffi::c_void;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use cudarc::driver::sys::{self, CUstream};

use super::Cuda;
use super::layout::{Copies, Rows, THREADS};
use crate::comm::operation::{Layout, Operation, Pair};
use crate::comm::view::Tensor;
use crate::device::Device;
use crate::device::cuda::{capturing, pointer};
use crate::error::{Error, Result};

/// Up to so many bytes in all, kernels read and write pinned host memory; above, the copy engines are faster.
const KERNEL_BELOW: usize = 512 << 10;
/// How long a word in host memory is looked at before the stream is waited for.
const LOOK_FOR: Duration = Duration::from_millis(2);

/// What one rank copies to or from host memory.
#[derive(Clone, Copy)]
struct Copy<'a> {
    rank: usize,
    stream: CUstream,
    from: Columns<'a>,
    to: Columns<'a>,
}

/// Columns of a tensor.
#[derive(Clone, Copy)]
struct Columns<'a> {
    tensor: &'a Tensor,
    start: usize,
    width: usize,
}

impl Columns<'_> {
    fn at(&self) -> usize {
        self.tensor.data + self.start * self.tensor.dtype.size()
    }

    fn address(&self) -> u64 {
        self.at() as u64
    }

    fn stride(&self) -> usize {
        let size = self.tensor.dtype.size();
        if self.tensor.rows == 1 { self.width * size } else { self.tensor.row_stride * size }
    }

    fn bytes(&self) -> usize {
        self.tensor.rows * self.width * self.tensor.dtype.size()
    }
}

impl Cuda {
    /// A list call.
    ///
    /// # Safety
    /// As for `Backend::list`.
    pub(super) unsafe fn list_on(
        &self,
        operation: &Operation<'_>,
        pairs: &[Pair],
        streams: &[CUstream],
    ) -> Result<()> {
        let caller = self.ranks();
        let (own, beyond) = pairs.split_at(caller.min(pairs.len()));
        let guest = beyond.first().copied().unwrap_or_default();
        match operation {
            Operation::AddResidual { layout } => self.add_residual(layout, own, streams),
            Operation::Broadcast { root } if *root == caller => match guest.gives() {
                Some(source) if source.device == Device::Cpu => self.send(source, own, streams),
                Some(source) => self.broadcast_from_guest(source, own, streams),
                None => Ok(()),
            },
            Operation::Gather { root, layout, blocking } if *root == caller => match guest.gets() {
                Some(target) if target.device == Device::Cpu => {
                    self.fetch(layout, own, target, streams, *blocking)
                }
                Some(target) => self.gather_to_guest(layout, own, target, streams),
                None => Ok(()),
            },
            _ => self.launch_all(&self.prepare(operation, own)?, streams),
        }
    }

    /// The rank whose stream stands for a tensor that belongs to no rank.
    fn host_of(&self, tensor: &Tensor, argument: &str) -> Result<usize> {
        self.devices.iter().position(|device| *device == tensor.device).ok_or_else(|| {
            let wanted = "a tensor on a device of one of the ranks, or in host memory";
            Error::invalid(argument, tensor, wanted)
        })
    }

    fn broadcast_from_guest(&self, source: &Tensor, own: &[Pair], streams: &[CUstream]) -> Result<()> {
        let root = self.host_of(source, "broadcast: source")?;
        let mut pairs = own.to_vec();
        if let Some(pair) = pairs.get_mut(root) {
            pair.input = Some(*source);
        }
        self.launch_all(&self.prepare(&Operation::Broadcast { root }, &pairs)?, streams)
    }

    fn gather_to_guest(
        &self,
        layout: &Layout<'_>,
        own: &[Pair],
        target: &Tensor,
        streams: &[CUstream],
    ) -> Result<()> {
        let root = self.host_of(target, "gather: target")?;
        let mut pairs = own.to_vec();
        if let Some(pair) = pairs.get_mut(root) {
            pair.output = Some(*target);
        }
        let operation = Operation::Gather { root, layout: layout.clone(), blocking: false };
        self.launch_all(&self.prepare(&operation, &pairs)?, streams)
    }

    /// Copies a tensor in host memory to every rank's. Complete for the host on return, so that the source may be
    /// changed or freed.
    fn send(&self, source: &Tensor, own: &[Pair], streams: &[CUstream]) -> Result<()> {
        let mut copies = Vec::with_capacity(own.len());
        for ((rank, pair), stream) in own.iter().enumerate().zip(streams) {
            let Some(target) = pair.gets() else { continue };
            let from = Columns { tensor: source, start: 0, width: source.columns };
            let to = Columns { tensor: target, start: 0, width: target.columns };
            copies.push(Copy { rank, stream: *stream, from, to });
        }
        self.copy_all(&copies, source, true)
    }

    /// Copies every rank's columns to a tensor in host memory.
    fn fetch(
        &self,
        layout: &Layout<'_>,
        own: &[Pair],
        target: &Tensor,
        streams: &[CUstream],
        blocking: bool,
    ) -> Result<()> {
        let mut copies = Vec::with_capacity(own.len());
        let mut covered = 0;
        for ((rank, pair), stream) in own.iter().enumerate().zip(streams) {
            let (Some(part), Some((start, end))) = (pair.gives(), layout.columns(rank)) else { continue };
            // Columns that several ranks have are taken from the first.
            let begin = start.max(covered);
            covered = covered.max(end);
            if begin >= end {
                continue;
            }
            let from = Columns { tensor: part, start: begin - start, width: end - begin };
            let to = Columns { tensor: target, start: begin, width: end - begin };
            copies.push(Copy { rank, stream: *stream, from, to });
        }
        self.copy_all(&copies, target, blocking)
    }

    /// Copies between ranks and host memory. With `blocking`, returns when all of it is done. In a capture nothing has
    /// run yet, so there is nothing to wait for: host memory has to be there when the graph runs.
    fn copy_all(&self, copies: &[Copy<'_>], host: &Tensor, blocking: bool) -> Result<()> {
        let mut waits = Vec::new();
        let mut result = self.queue_copies(copies, host, blocking, &mut waits);
        // Also after a failure: the caller may free its memory, and what was queued still uses it.
        for (copy, value) in waits {
            let waited = match value {
                Some(value) => self.wait_for_word(copy, value),
                None => self.synchronize(copy.rank, copy.stream),
            };
            result = result.and(waited.map_err(|error| error.of_rank(copy.rank)));
        }
        result
    }

    /// Queues copies, and notes what has to be waited for: a stream, or the word that its kernel writes.
    fn queue_copies<'a>(
        &self,
        copies: &'a [Copy<'a>],
        host: &Tensor,
        blocking: bool,
        waits: &mut Vec<(&'a Copy<'a>, Option<u32>)>,
    ) -> Result<()> {
        let Some(first) = copies.first() else { return Ok(()) };
        let bytes = copies.iter().map(|copy| copy.from.bytes()).fold(0, usize::saturating_add);
        let pinned = pointer::pinned(self.machine(first.rank)?.context(), host.data as u64)
            .map_err(|error| error.of_rank(first.rank))?;
        for (index, copy) in copies.iter().enumerate() {
            let same = |other: &&Copy<'_>| {
                other.stream == copy.stream && self.seats.get(other.rank) == self.seats.get(copy.rank)
            };
            if copies.iter().take(index).any(|other| same(&other)) {
                continue;
            }
            let group: Vec<_> = copies.iter().filter(same).copied().collect();
            let context = self.machine(copy.rank)?.context();
            let of_rank = |error: Error| error.of_rank(copy.rank);
            let blocking = blocking && !capturing(context, copy.stream).map_err(of_rank)?;
            if pinned && bytes <= KERNEL_BELOW {
                if let Some(value) = self.copy_by_kernel(&group, blocking).map_err(of_rank)? {
                    waits.push((copy, Some(value)));
                }
                continue;
            }
            if blocking {
                waits.push((copy, None));
            }
            for copy in &group {
                self.copy_by_engine(copy).map_err(|error| error.of_rank(copy.rank))?;
            }
        }
        Ok(())
    }

    /// Waits for a rank's stream.
    pub(super) fn synchronize(&self, rank: usize, stream: CUstream) -> Result<()> {
        let context = self.machine(rank)?.context();
        let _current = context.enter()?;
        // SAFETY: the stream is one of this device, by the caller's promise.
        context.check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(stream) })
    }

    /// Looks at the word that a kernel writes, and waits for the stream if that takes long: it may stand behind much
    /// other work, or have failed.
    fn wait_for_word(&self, copy: &Copy<'_>, value: u32) -> Result<()> {
        let since = Instant::now();
        while self.rooms.copied(copy.rank) != value {
            if since.elapsed() > LOOK_FOR {
                return self.synchronize(copy.rank, copy.stream);
            }
            std::hint::spin_loop();
        }
        Ok(())
    }

    /// Copies of ranks that share a stream, in one launch. Returns what the kernel will write where it is done.
    fn copy_by_kernel(&self, group: &[Copy<'_>], blocking: bool) -> Result<Option<u32>> {
        let (Some(first), Some(widest)) = (group.first(), group.iter().map(|copy| copy.from.bytes()).max())
        else {
            return Ok(None);
        };
        let machine = self.machine(first.rank)?;
        let mut parameter = Copies::default();
        for (rows, copy) in parameter.rows.iter_mut().zip(group) {
            *rows = Rows {
                to: copy.to.address(),
                to_stride: copy.to.stride() as u64,
                from: copy.from.address(),
                from_stride: copy.from.stride() as u64,
                count: copy.from.tensor.rows as u64,
                width: (copy.from.width * copy.from.tensor.dtype.size()) as u64,
            };
        }
        let Some(queue) = self.queues.get(first.rank) else { return Ok(None) };
        let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
        if blocking {
            queue.copies = queue.copies.wrapping_add(1);
            parameter.value = queue.copies;
            (parameter.leaving, parameter.done) = self.rooms.copied_places(first.rank);
        }
        let blocks = u32::try_from(widest.div_ceil(16 * THREADS as usize)).unwrap_or(1).clamp(1, 32);
        let ranks = u32::try_from(group.len()).unwrap_or(1);
        let mut parameters: [*mut c_void; 1] = [(&raw mut parameter).cast()];
        // SAFETY: the tensors were checked, pinned memory has the same address everywhere, and the caller of the
        // operation answers for the memory and the stream.
        unsafe {
            machine.kernels.module.launch(
                machine.kernels.copy,
                (blocks, ranks),
                THREADS,
                first.stream,
                &mut parameters,
            )?;
        };
        Ok(blocking.then_some(parameter.value))
    }

    /// One rank's copy by the copy engine, in the order of its stream.
    fn copy_by_engine(&self, copy: &Copy<'_>) -> Result<()> {
        let context = self.machine(copy.rank)?.context();
        let (from, to) = (copy.from, copy.to);
        let to_host = to.tensor.device == Device::Cpu;
        let (host_kind, device_kind) =
            (sys::CUmemorytype::CU_MEMORYTYPE_HOST, sys::CUmemorytype::CU_MEMORYTYPE_DEVICE);
        let pointer = |columns: Columns<'_>| std::ptr::with_exposed_provenance_mut::<c_void>(columns.at());
        let description = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: if to_host { device_kind } else { host_kind },
            srcHost: if to_host { std::ptr::null() } else { pointer(from) },
            srcDevice: if to_host { from.address() } else { 0 },
            srcArray: std::ptr::null_mut(),
            srcPitch: from.stride(),
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: if to_host { host_kind } else { device_kind },
            dstHost: if to_host { pointer(to) } else { std::ptr::null_mut() },
            dstDevice: if to_host { 0 } else { to.address() },
            dstArray: std::ptr::null_mut(),
            dstPitch: to.stride(),
            WidthInBytes: from.width * from.tensor.dtype.size(),
            Height: from.tensor.rows,
        };
        let _current = context.enter()?;
        // SAFETY: as above; the driver reads the description before it returns.
        let code = unsafe { sys::cuMemcpy2DAsync_v2(&raw const description, copy.stream) };
        context.check("cuMemcpy2DAsync_v2", code)
    }
}
