//! List calls on CUDA ranks, and what they do with tensors in host memory.

use std::ffi::c_void;

use cudarc::driver::sys::{self, CUstream};

use super::Cuda;
use super::layout::{Rows, THREADS};
use crate::comm::operation::{Layout, Operation, Pair};
use crate::comm::view::Tensor;
use crate::device::Device;
use crate::device::cuda::{capturing, pointer};
use crate::error::{Error, Result};

/// Up to so many bytes a kernel writes a rank's columns to pinned host memory; above, the copy engine is faster.
const KERNEL_BELOW: usize = 64 << 10;

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
                    let waits = self.fetch(layout, own, target, streams)?;
                    if *blocking { self.finish(&waits) } else { Ok(()) }
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
        let mut waits = Vec::new();
        for ((rank, pair), stream) in own.iter().enumerate().zip(streams) {
            let Some(target) = pair.gets() else { continue };
            let from = Columns { tensor: source, start: 0, width: source.columns };
            let to = Columns { tensor: target, start: 0, width: target.columns };
            self.copy(rank, from, to, *stream)?;
            waits.push((rank, *stream));
        }
        self.finish(&waits)
    }

    /// Copies every rank's columns to a tensor in host memory, and says on which streams.
    fn fetch(
        &self,
        layout: &Layout<'_>,
        own: &[Pair],
        target: &Tensor,
        streams: &[CUstream],
    ) -> Result<Vec<(usize, CUstream)>> {
        let mut waits = Vec::new();
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
            self.copy(rank, from, to, *stream)?;
            waits.push((rank, *stream));
        }
        Ok(waits)
    }

    /// Waits for what was copied. In a capture nothing has run yet, so there is nothing to wait for: what a captured
    /// copy reads or writes has to be there when the graph runs.
    fn finish(&self, waits: &[(usize, CUstream)]) -> Result<()> {
        for (index, (rank, stream)) in waits.iter().enumerate() {
            let before = waits.get(..index).unwrap_or(&[]);
            if before
                .iter()
                .any(|(other, known)| known == stream && self.seats.get(*other) == self.seats.get(*rank))
            {
                continue;
            }
            if !capturing(&self.machine(*rank)?.context, *stream)? {
                self.synchronize(*rank, *stream)?;
            }
        }
        Ok(())
    }

    /// Waits for a rank's stream.
    pub(super) fn synchronize(&self, rank: usize, stream: CUstream) -> Result<()> {
        let context = &self.machine(rank)?.context;
        let _current = context.enter()?;
        // SAFETY: the stream is one of this device, by the caller's promise.
        context.check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(stream) })
    }

    /// Copies columns between a rank's device and host memory, in the order of the stream.
    fn copy(&self, rank: usize, from: Columns<'_>, to: Columns<'_>, stream: CUstream) -> Result<()> {
        let machine = self.machine(rank)?;
        let context = &machine.context;
        let host = if from.tensor.device == Device::Cpu { from } else { to };
        let width = from.width * from.tensor.dtype.size();
        let _current = context.enter()?;
        if from.bytes() <= KERNEL_BELOW && pointer::pinned(context, host.address())? {
            let mut rows = Rows {
                to: to.address(),
                to_stride: to.stride() as u64,
                from: from.address(),
                from_stride: from.stride() as u64,
                count: from.tensor.rows as u64,
                width: width as u64,
            };
            let blocks =
                u32::try_from(from.bytes().div_ceil(16 * THREADS as usize)).unwrap_or(1).clamp(1, 16);
            let mut parameters: [*mut c_void; 1] = [(&raw mut rows).cast()];
            // SAFETY: both tensors were checked, pinned memory has the same address everywhere, and the caller of the
            // operation answers for the memory and the stream.
            return unsafe {
                machine.module.launch(machine.copy, (blocks, 1), THREADS, stream, &mut parameters)
            };
        }
        let to_host = to.tensor.device == Device::Cpu;
        let (host_kind, device_kind) =
            (sys::CUmemorytype::CU_MEMORYTYPE_HOST, sys::CUmemorytype::CU_MEMORYTYPE_DEVICE);
        let pointer = |columns: Columns<'_>| std::ptr::with_exposed_provenance_mut::<c_void>(columns.at());
        let copy = sys::CUDA_MEMCPY2D {
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
            WidthInBytes: width,
            Height: from.tensor.rows,
        };
        // SAFETY: as above; the driver reads the description before it returns.
        context.check("cuMemcpy2DAsync_v2", unsafe { sys::cuMemcpy2DAsync_v2(&raw const copy, stream) })
    }
}
