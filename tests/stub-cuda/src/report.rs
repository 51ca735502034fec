//! What a correct caller never does. Tests ask for the list, which has to be empty.

use std::sync::{Mutex, PoisonError};

static VIOLATIONS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Notes misuse that the real driver may let pass, or punish by undefined behaviour.
pub(crate) fn violation(text: impl Into<String>) {
    VIOLATIONS.lock().unwrap_or_else(PoisonError::into_inner).push(text.into());
}

/// Notes misuse and gives the error that the call ends in.
pub(crate) fn misuse(code: i32, text: impl Into<String>) -> i32 {
    violation(text);
    code
}

/// All that was noted since the last time.
pub(crate) fn take() -> Vec<String> {
    std::mem::take(&mut *VIOLATIONS.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Ends the process where a wait will not end by itself: a test that hangs says nothing.
pub(crate) fn hang(what: &str) -> ! {
    eprintln!("stub driver: {what} did not end within {} s", crate::stream::PATIENCE.as_secs());
    for text in take() {
        eprintln!("stub driver: {text}");
    }
    std::process::abort();
}
