//! The driver's functions, with the names and parameters of cuda.h. A function that `tp_rs` begins to call is added
//! here and to `SYMBOLS` in src/device/cuda/probe.rs; the tests of faults then cover it by themselves.

mod context;
mod copies;
mod graph;
mod memory;
mod module;
mod stream;

/// Declares exported functions. `fn` ones do nothing if they are made to fail; `give_back fn` ones do their work all
/// the same, since real ones then report the errors of what ran before.
macro_rules! driver {
    ($($(#[$doc:meta])* give_back fn $name:ident($($arg:ident: $type:ty),*) $body:block)*) => {$(
        $(#[$doc])*
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> i32 {
            $crate::faults::call(stringify!($name), $crate::faults::Failing::Afterwards, || $body)
        }
    )*};
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),*) $body:block)*) => {$(
        $(#[$doc])*
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> i32 {
            $crate::faults::call(stringify!($name), $crate::faults::Failing::Instead, || $body)
        }
    )*};
}
pub(crate) use driver;

use crate::codes::{INVALID_VALUE, Result};

/// Stores a result where the caller wants it.
pub(crate) fn store<T>(place: *mut T, value: T) -> Result {
    if place.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: the caller's place for a `T`, as the function is declared.
    unsafe { place.write_unaligned(value) };
    Ok(())
}
