//! What the driver knows of an address.

use cudarc::driver::sys::{self, CUcontext, CUpointer_attribute as Attribute, CUresult};

use super::context::Context;
use crate::error::Result;

/// Whether peers with access to the device can use this memory where it is: whether it was allocated plainly in
/// this context. Memory of pools (`cudaMallocAsync`) and memory mapped by hand (torch's expandable segments) has
/// access lists of its own.
pub(crate) fn plain(context: &Context, address: u64) -> Result<bool> {
    let _current = context.enter()?;
    let mut owner: CUcontext = std::ptr::null_mut();
    let mut pool: sys::CUmemoryPool = std::ptr::null_mut();
    let mut which = [Attribute::CU_POINTER_ATTRIBUTE_CONTEXT, Attribute::CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE];
    let mut places = [(&raw mut owner).cast(), (&raw mut pool).cast()];
    // SAFETY: each attribute has a place of its type; an address that the driver does not know gives zeros.
    let code = unsafe { sys::cuPointerGetAttributes(2, which.as_mut_ptr(), places.as_mut_ptr(), address) };
    if code == CUresult::CUDA_ERROR_INVALID_VALUE {
        return Ok(false);
    }
    context.check("cuPointerGetAttributes", code)?;
    Ok(owner == context.raw() && pool.is_null())
}

/// Whether a host address is pinned, so that copies to and from it need no staging and do not block.
pub(crate) fn pinned(context: &Context, address: u64) -> Result<bool> {
    let _current = context.enter()?;
    let mut kind = 0_u32;
    let mut which = [Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE];
    let mut places = [(&raw mut kind).cast()];
    // SAFETY: as above.
    let code = unsafe { sys::cuPointerGetAttributes(1, which.as_mut_ptr(), places.as_mut_ptr(), address) };
    if code == CUresult::CUDA_ERROR_INVALID_VALUE {
        return Ok(false);
    }
    context.check("cuPointerGetAttributes", code)?;
    Ok(kind == sys::CUmemorytype::CU_MEMORYTYPE_HOST as u32)
}
