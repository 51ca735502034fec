//! Modules: what there is to know of them from the text that is loaded.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::codes::{INVALID_HANDLE, INVALID_PTX, NO_BINARY, NOT_FOUND, Result};
use crate::device;
use crate::layout::SIZES;
use crate::memory::{self, Class, Home};
use crate::report::{misuse, violation};
use crate::stream::fresh;

/// A kernel.
pub(crate) struct Kernel {
    pub(crate) device: u32,
    pub(crate) entry: Entry,
}

/// What the text says of a kernel.
#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) name: String,
    /// Bytes of each.
    pub(crate) parameters: Vec<usize>,
    /// Whether it waits for the kernel before, before it uses memory.
    pub(crate) waits: bool,
    /// Whether an instruction that uses memory was read.
    uses: bool,
    /// Labels that were read, and those that branches lead to and were not.
    labels: Vec<String>,
    ahead: Vec<String>,
}

impl Entry {
    fn new(name: String) -> Self {
        Self {
            name,
            parameters: Vec::new(),
            waits: false,
            uses: false,
            labels: Vec::new(),
            ahead: Vec::new(),
        }
    }

    /// Reads an instruction or a label, up to the wait.
    fn read(&mut self, line: &str) {
        let line = line.trim();
        if self.waits {
            return;
        }
        if line == WAIT {
            // A branch to what is still ahead would lead past it.
            self.waits = !self.uses && self.ahead.is_empty();
        } else if let Some(label) = line.strip_suffix(':') {
            self.labels.push(label.to_owned());
            self.ahead.retain(|other| other != label);
        } else if let Some(label) = branch(line) {
            if !self.labels.iter().any(|known| known == label) {
                self.ahead.push(label.to_owned());
            }
        } else {
            self.uses |= uses_memory(line);
        }
    }
}

struct Module {
    device: u32,
    kernels: Vec<Entry>,
    /// Name, address and bytes of a variable.
    variables: Vec<(String, u64, usize)>,
    functions: Vec<usize>,
}

/// The instruction by which a kernel waits for the one before.
const WAIT: &str = "griddepcontrol.wait;";

static MODULES: Mutex<Option<HashMap<usize, Module>>> = Mutex::new(None);
static FUNCTIONS: Mutex<Option<HashMap<usize, Arc<Kernel>>>> = Mutex::new(None);

fn table<T>(of: &'static Mutex<Option<T>>) -> MutexGuard<'static, Option<T>> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes of `.param .align 8 .b8 name[992]` or `.param .u64 name`.
fn parameter(line: &str) -> Option<usize> {
    let rest = line.trim().strip_prefix(".param ")?;
    if let Some((_, count)) = rest.split_once('[') {
        return count.trim_end_matches([']', ',']).parse().ok();
    }
    let kind = rest.split_whitespace().next()?;
    kind.get(2..)?.parse::<usize>().ok().map(|bits| bits / 8)
}

/// Name and content of `.global .align 4 .b8 name[24] = {1, 2}`.
fn variable(line: &str) -> Option<(String, Vec<u8>)> {
    let rest = line.trim().strip_prefix(".global ")?;
    let (head, content) = rest.split_once(']')?;
    let (before, count) = head.split_once('[')?;
    let name = before.split_whitespace().next_back()?;
    let mut bytes: Vec<u8> = Vec::new();
    if let Some((_, list)) = content.split_once('{') {
        bytes = list
            .trim_end_matches(['}', ';'])
            .split(',')
            .filter_map(|byte| byte.trim().parse().ok())
            .collect();
    }
    bytes.resize(count.parse().ok()?, 0);
    Some((name.to_owned(), bytes))
}

/// Where a branch leads.
fn branch(line: &str) -> Option<&str> {
    let (_, label) = line.split_once("bra")?;
    Some(label.trim_start_matches(".uni").trim().trim_end_matches(';'))
}

/// Whether an instruction uses memory that others may, or goes where one might.
fn uses_memory(line: &str) -> bool {
    let line =
        if line.starts_with('@') { line.split_once(' ').map_or("", |(_, rest)| rest.trim()) } else { line };
    let uses = ["ld.", "st.", "atom.", "red.", "call", "bar.", "ret"];
    uses.iter().any(|start| line.starts_with(start)) && !line.starts_with("ld.param")
}

/// Loads a module and gives its handle.
pub(crate) fn load(device: u32, context: usize, text: &str) -> Result<usize> {
    let target =
        text.split_once(".target sm_").and_then(|(_, rest)| rest.lines().next()?.trim().parse::<u32>().ok());
    let (Some(target), true) = (target, text.contains(".version")) else { return Err(INVALID_PTX) };
    if target / 10 > device::with(device, |device| device.capability)? {
        return Err(NO_BINARY);
    }
    if target < 90 && text.contains(WAIT) {
        return Err(INVALID_PTX);
    }
    let mut kernels: Vec<Entry> = Vec::new();
    let mut variables = Vec::new();
    let mut in_head = false;
    for line in text.lines() {
        if let Some(name) = line.strip_prefix(".visible .entry ") {
            in_head = !name.ends_with(')');
            let name = name.trim_end_matches(['(', ')']).to_owned();
            kernels.push(Entry::new(name));
        } else if in_head {
            match (parameter(line), kernels.last_mut()) {
                (Some(bytes), Some(kernel)) => kernel.parameters.push(bytes),
                _ => in_head = false,
            }
        } else if line.starts_with(".global ")
            && let Some((name, bytes)) = variable(line)
            && name == "tp_rs_layout"
        {
            compare(&bytes);
            let at = memory::allocate(Home::Device(device), bytes.len() as u64, context, 0, Class::Module)?;
            let place = memory::of_device("cuModuleLoadData", device, at, bytes.len() as u64)?;
            // SAFETY: allocated just now, as long as the content.
            unsafe { place.copy_from(bytes.as_ptr(), bytes.len()) };
            variables.push((name, at, bytes.len()));
        } else if let Some(kernel) = kernels.last_mut() {
            kernel.read(line);
        }
    }
    let handle = fresh();
    let module = Module { device, kernels, variables, functions: Vec::new() };
    table(&MODULES).get_or_insert_default().insert(handle, module);
    Ok(handle)
}

/// The kernels of this stub know the structures of src/comm/cuda/layout.rs only.
fn compare(bytes: &[u8]) {
    let sizes: Vec<u32> =
        bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect();
    if sizes != SIZES {
        violation(format!("the module has structures of {sizes:?} bytes, the stub's kernels know {SIZES:?}"));
    }
}

fn unknown(call: &str, module: usize) -> i32 {
    misuse(INVALID_HANDLE, format!("{call} of module {module:#x}, which was unloaded or never was"))
}

pub(crate) fn function(call: &str, module: usize, name: &str) -> Result<usize> {
    let mut modules = table(&MODULES);
    let Some(module) = modules.get_or_insert_default().get_mut(&module) else {
        return Err(unknown(call, module));
    };
    let Some(entry) = module.kernels.iter().find(|entry| entry.name == name) else {
        return Err(NOT_FOUND);
    };
    let kernel = Kernel { device: module.device, entry: entry.clone() };
    let handle = fresh();
    module.functions.push(handle);
    table(&FUNCTIONS).get_or_insert_default().insert(handle, Arc::new(kernel));
    Ok(handle)
}

pub(crate) fn global(call: &str, module: usize, name: &str) -> Result<(u64, usize)> {
    let mut modules = table(&MODULES);
    let Some(module) = modules.get_or_insert_default().get(&module) else {
        return Err(unknown(call, module));
    };
    let found = module.variables.iter().find(|(known, _, _)| known == name);
    found.map(|(_, at, bytes)| (*at, *bytes)).ok_or(NOT_FOUND)
}

pub(crate) fn kernel(call: &str, function: usize) -> Result<Arc<Kernel>> {
    let found = table(&FUNCTIONS).get_or_insert_default().get(&function).cloned();
    found.ok_or_else(|| {
        misuse(INVALID_HANDLE, format!("{call} of function {function:#x}, whose module is not loaded"))
    })
}

pub(crate) fn unload(call: &str, module: usize) -> Result {
    let Some(gone) = table(&MODULES).get_or_insert_default().remove(&module) else {
        return Err(unknown(call, module));
    };
    for function in gone.functions {
        table(&FUNCTIONS).get_or_insert_default().remove(&function);
    }
    for (_, at, _) in gone.variables {
        memory::free(call, at, false)?;
    }
    Ok(())
}

pub(crate) fn live() -> u64 {
    table(&MODULES).get_or_insert_default().len() as u64
}
