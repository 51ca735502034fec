//! Memory as the kernels of one device see it. Every access is checked.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::codes::Result;
use crate::{device, memory};

#[derive(Clone, Copy)]
pub(super) struct Eye(pub(super) u32);

impl Eye {
    /// Fails once the device's context is broken: that ends all its kernels.
    pub(super) fn alive(self) -> Result {
        match device::broken(self.0) {
            0 => Ok(()),
            code => Err(code),
        }
    }

    fn word32(self, at: u64) -> Result<Option<&'static AtomicU32>> {
        let place = memory::seen_by(self.0, at, 4, 4)?;
        // SAFETY: 4 aligned bytes of memory of the driver, whose mapping stays; flags are accessed atomically only.
        Ok(place.map(|place| unsafe { AtomicU32::from_ptr(place.cast()) }))
    }

    fn word64(self, at: u64) -> Result<Option<&'static AtomicU64>> {
        let place = memory::seen_by(self.0, at, 8, 8)?;
        // SAFETY: as above, for 8 bytes.
        Ok(place.map(|place| unsafe { AtomicU64::from_ptr(place.cast()) }))
    }

    pub(super) fn load32(self, at: u64) -> Result<u32> {
        Ok(self.word32(at)?.map_or(0, |word| word.load(Ordering::Acquire)))
    }

    pub(super) fn store32(self, at: u64, value: u32) -> Result {
        if let Some(word) = self.word32(at)? {
            word.store(value, Ordering::Release);
        }
        Ok(())
    }

    /// Adds to a word and gives what it was.
    pub(super) fn add32(self, at: u64, value: u32) -> Result<u32> {
        Ok(self.word32(at)?.map_or(0, |word| word.fetch_add(value, Ordering::AcqRel)))
    }

    /// Replaces a word and gives what it was.
    pub(super) fn swap32(self, at: u64, value: u32) -> Result<u32> {
        Ok(self.word32(at)?.map_or(0, |word| word.swap(value, Ordering::AcqRel)))
    }

    pub(super) fn load64(self, at: u64) -> Result<u64> {
        Ok(self.word64(at)?.map_or(0, |word| word.load(Ordering::Acquire)))
    }

    pub(super) fn store64(self, at: u64, value: u64) -> Result {
        if let Some(word) = self.word64(at)? {
            word.store(value, Ordering::Release);
        }
        Ok(())
    }

    /// Reads bytes in units of `align`.
    pub(super) fn read(self, at: u64, into: &mut [u8], align: u64) -> Result {
        match memory::seen_by(self.0, at, into.len() as u64, align)? {
            // SAFETY: as many bytes of memory of the driver; flags order this after what was written.
            Some(place) => unsafe { place.copy_to(into.as_mut_ptr(), into.len()) },
            None => into.fill(0),
        }
        Ok(())
    }

    /// Writes bytes in units of `align`.
    pub(super) fn write(self, at: u64, from: &[u8], align: u64) -> Result {
        if let Some(place) = memory::seen_by(self.0, at, from.len() as u64, align)? {
            // SAFETY: as above; flags order what reads it after this.
            unsafe { place.copy_from(from.as_ptr(), from.len()) };
        }
        Ok(())
    }
}
