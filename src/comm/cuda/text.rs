//! The kernels' text, as a device gets it.

use std::borrow::Cow;
use std::ffi::{CStr, CString};

use crate::error::{Error, Result};

/// The text that cuda/build.py makes, for every card since compute capability 7.0.
const TEXT: &str = concat!(include_str!("../../../cuda/tp_rs.ptx"), "\0");
/// What stands in kernels that may start while the one before them ends (cuda/primitives.cuh).
const REMARK: &str = "// tp_rs: wait for the kernel before";
/// The instruction in its place, and the cards that know it. cuda/assemble.py puts it there too.
const WAIT: &str = "griddepcontrol.wait;";
const TARGETS: [&str; 2] = [".target sm_70", ".target sm_90"];

/// The text for a device. `overlaps`: whether kernels are launched so that they start while the one before still ends,
/// and have to wait for that by themselves.
pub(super) fn for_device(overlaps: bool) -> Result<Cow<'static, CStr>> {
    let broken = || Error::invalid("kernels", "a text with a NUL inside", "text");
    if !overlaps {
        return CStr::from_bytes_with_nul(TEXT.as_bytes()).map(Cow::Borrowed).map_err(|_| broken());
    }
    let [without, with] = TARGETS;
    let text = TEXT.trim_end_matches('\0').replacen(without, with, 1).replace(REMARK, WAIT);
    CString::new(text).map(Cow::Owned).map_err(|_| broken())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kernels that `launch.rs` starts early.
    const EARLY: [&str; 6] = [
        "all_reduce_small",
        "all_reduce_large",
        "reduce_scatter_small",
        "reduce_scatter",
        "add_residual",
        "take",
    ];

    /// Name and instructions of every kernel.
    fn kernels(text: &str) -> Vec<(&str, Vec<&str>)> {
        text.split(".visible .entry ")
            .skip(1)
            .map(|part| {
                let (name, rest) = part.split_once('(').unwrap();
                let (_, body) = rest.split_once("\n{\n").unwrap();
                let (body, _) = body.split_once("\n}\n").unwrap();
                (name, body.lines().map(str::trim).collect())
            })
            .collect()
    }

    fn is_early(name: &str) -> bool {
        let kinds = ["f64", "f32", "f16", "bf16", "f8e4m3", "f8e5m2"];
        name == "take_small"
            || EARLY.iter().any(|early| {
                name.strip_prefix(early).is_some_and(|rest| {
                    rest.is_empty() || kinds.iter().any(|kind| rest.strip_prefix('_') == Some(kind))
                })
            })
    }

    /// Whether an instruction may use memory that others do, or leaves for one that may.
    fn uses_memory(instruction: &str) -> bool {
        let apart = ["ld.param", "ld.const", "st.param", "ld.local", "st.local"];
        let uses = ["ld.", "st.", "atom.", "red.", "call", "bar.", "membar", "fence", "ret"];
        // Behind the predicate, if there is one.
        let instruction = instruction.strip_prefix('@').map_or(instruction, |rest| {
            rest.split_once(char::is_whitespace).map_or("", |(_, rest)| rest.trim_start())
        });
        uses.iter().any(|start| instruction.starts_with(start))
            && !apart.iter().any(|start| instruction.starts_with(start))
    }

    /// Where a branch leads.
    fn target(instruction: &str) -> Option<&str> {
        let (_, target) = instruction.split_once("bra")?;
        Some(target.trim_start_matches(".uni").trim().trim_end_matches(';'))
    }

    #[test]
    fn branches_lead_to_labels() {
        assert_eq!(target("@%p4 bra \t$L__BB34_2;"), Some("$L__BB34_2"));
        assert_eq!(target("bra.uni \t$L__BB34_9;"), Some("$L__BB34_9"));
        assert_eq!(target("mov.u32 \t%r1, %ctaid.y;"), None);
        let text = for_device(true).unwrap();
        let kernels = kernels(text.to_str().unwrap());
        let known =
            |lines: &[&str], label: &str| lines.iter().any(|line| line.strip_suffix(':') == Some(label));
        let branches = |lines: &[&str]| lines.iter().filter(|line| target(line).is_some()).count();
        assert!(kernels.iter().map(|(_, lines)| branches(lines)).sum::<usize>() > 1000);
        for (name, lines) in kernels {
            let astray = lines.iter().find(|line| target(line).is_some_and(|label| !known(&lines, label)));
            assert_eq!(astray, None, "{name}");
        }
    }

    #[test]
    fn who_starts_early_waits_once_and_before_all_else() {
        let text = for_device(true).unwrap();
        let kernels = kernels(text.to_str().unwrap());
        assert_eq!(kernels.iter().filter(|(name, _)| is_early(name)).count(), 5 * 6 + 2);
        for (name, instructions) in kernels {
            let waits = instructions.iter().filter(|line| **line == WAIT).count();
            assert_eq!(waits, usize::from(is_early(name)), "waits of {name}");
            if let Some(at) = instructions.iter().position(|line| *line == WAIT) {
                let (before, after) = instructions.split_at(at);
                assert_eq!(before.iter().find(|line| uses_memory(line)), None, "before the wait of {name}");
                // Nobody gets round it.
                let past = before.iter().find(|line| {
                    target(line)
                        .is_some_and(|label| !before.iter().any(|line| line.strip_suffix(':') == Some(label)))
                });
                assert_eq!(past, None, "past the wait of {name}");
                assert!(after.iter().any(|line| uses_memory(line)), "{name} does nothing");
            }
        }
    }

    #[test]
    fn other_devices_get_the_text_as_it_was_made() {
        let made = include_str!("../../../cuda/tp_rs.ptx");
        assert_eq!(for_device(false).unwrap().to_str().unwrap(), made);
        let changed = for_device(true).unwrap().into_owned().into_string().unwrap();
        let lines: Vec<_> = changed.lines().zip(made.lines()).filter(|(new, old)| new != old).collect();
        assert_eq!(changed.lines().count(), made.lines().count());
        let allowed = |(new, old): &(&str, &str)| {
            (new.trim(), old.trim()) == (WAIT, REMARK) || (*new, *old) == (TARGETS[1], TARGETS[0])
        };
        assert!(lines.iter().all(allowed), "{lines:?}");
        assert_eq!(changed.matches("griddepcontrol").count(), lines.len() - 1);
    }

    /// Whether an instruction takes a register of 64 bits apart and the next one puts it together with another half.
    fn replaces_half(pair: &[&str]) -> bool {
        let [apart, together] = pair else { return false };
        let source = apart.strip_prefix("mov.b64").and_then(|rest| rest.trim_start().strip_prefix('{'));
        let source =
            source.and_then(|rest| rest.split_once("}, ")).map(|(_, source)| source.trim_end_matches(';'));
        let target = together.strip_prefix("mov.b64").and_then(|rest| rest.split_once(", {"));
        source.is_some() && source == target.map(|(target, _)| target.trim())
    }

    #[test]
    fn no_half_of_a_register_is_replaced() {
        assert!(replaces_half(&["mov.b64 \t{%r1, %r2}, %rd7;", "mov.b64 \t%rd7, {%r1, %r3};"]));
        let made = include_str!("../../../cuda/tp_rs.ptx");
        let lines: Vec<_> = made.lines().map(str::trim).collect();
        // ptxas of CUDA 12.9 and 13 lost the other half (sm_90): it put the address of the load there.
        assert_eq!(lines.windows(2).filter(|pair| replaces_half(pair)).count(), 0);
    }
}
