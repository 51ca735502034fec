//! Matrices in the memory of the stub's devices, or pinned.

use tp_rs::comm::{Device, Tensor};

use super::Stub;
use super::common::Matrix;

/// What kind of memory a tensor is in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Memory {
    /// `cudaMalloc`: peers with access see it.
    Plain,
    /// `cudaMallocAsync`: peers do not.
    Pool,
    /// Mapped by hand, as torch's expandable segments: peers do not see it either.
    Mapped,
    Pinned,
    /// Of the process, which the driver does not know.
    Pageable,
}

/// A matrix somewhere.
pub(crate) struct Placed {
    stub: &'static Stub,
    memory: Memory,
    device: Device,
    address: u64,
    /// What it was filled with.
    pub(crate) before: Matrix,
    now: Matrix,
}

fn bytes(tensor: &Tensor) -> usize {
    tensor.rows * tensor.row_stride * tensor.dtype.size()
}

impl Placed {
    pub(crate) fn new(stub: &'static Stub, device: u32, memory: Memory, matrix: &Matrix) -> Self {
        let mut now = matrix.clone();
        let tensor = now.tensor();
        let kind = [Memory::Plain, Memory::Pool, Memory::Mapped, Memory::Pinned];
        let kind = kind.iter().position(|kind| *kind == memory);
        let at = match kind {
            Some(kind) if bytes(&tensor) > 0 => {
                let address = stub.stub_allocate(device, bytes(&tensor) as u64, kind as u32);
                assert_ne!(address, 0, "no memory for a test's tensor");
                let from = std::ptr::with_exposed_provenance(tensor.data);
                assert_eq!(stub.stub_poke(address, bytes(&tensor), from), 0);
                address
            }
            _ => 0,
        };
        let host = matches!(memory, Memory::Pinned | Memory::Pageable);
        let device = if host { Device::Cpu } else { Device::Cuda(device) };
        Self { stub, memory, device, address: at, before: matrix.clone(), now }
    }

    pub(crate) fn tensor(&mut self) -> Tensor {
        let tensor = self.now.tensor();
        let data = if self.memory == Memory::Pageable { tensor.data } else { self.address as usize };
        Tensor { data, device: self.device, ..tensor }
    }

    /// What is there now.
    pub(crate) fn now(&mut self) -> &Matrix {
        if self.address != 0 {
            let tensor = self.now.tensor();
            let into = std::ptr::with_exposed_provenance_mut(tensor.data);
            assert_eq!(self.stub.stub_peek(self.address, bytes(&tensor), into), 0);
        }
        &self.now
    }

    /// Puts back what was there at first.
    pub(crate) fn reset(&mut self) {
        let mut before = self.before.clone();
        let tensor = before.tensor();
        if self.address != 0 {
            let from = std::ptr::with_exposed_provenance(tensor.data);
            assert_eq!(self.stub.stub_poke(self.address, bytes(&tensor), from), 0);
        }
        // In its place: views of it stay valid.
        let to = self.now.tensor();
        if to.data != 0 {
            let from: *const u8 = std::ptr::with_exposed_provenance(tensor.data);
            let to: *mut u8 = std::ptr::with_exposed_provenance_mut(to.data);
            // SAFETY: both matrices have the same size, and nobody works on either.
            unsafe { to.copy_from(from, bytes(&tensor)) };
        }
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        if self.address != 0 {
            self.stub.stub_free(self.address);
        }
    }
}
