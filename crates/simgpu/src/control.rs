//! How tests set the machine up and ask what happened.

use std::ffi::{CStr, c_char};

use crate::config::Config;
use crate::core::{self, Machine};

/// Starts over with a new machine. Returns 0, or 1 when the text is no configuration.
///
/// # Safety
/// `text` is a terminated string.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn simgpu_configure(text: *const c_char) -> i32 {
    // SAFETY: the caller's promise.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    match Config::parse(&text) {
        Ok(config) => {
            // Loads that failed may have left work queued, which would run into the new machine's memory.
            let tails: Vec<_> =
                core::with(|machine| machine.all_streams().map(|stream| stream.tail()).collect());
            for (event, recording) in tails {
                event.wait(recording);
            }
            core::with(|machine| {
                let mut fresh = Machine::new(config);
                fresh.initialized = machine.initialized;
                *machine = fresh;
            });
            0
        }
        Err(error) => {
            eprintln!("{error}");
            1
        }
    }
}

/// Sets which calls fail and which are slow from now on, counting from now, and keeps everything else; calls that are being
/// slow go on at once. Returns as [`simgpu_configure`].
///
/// # Safety
/// `text` is a terminated string.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn simgpu_fail(text: *const c_char) -> i32 {
    // SAFETY: the caller's promise.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let Ok(config) = Config::parse(&text) else { return 1 };
    core::with(|machine| {
        (machine.config.fails, machine.config.slows) = (config.fails, config.slows);
        machine.pace += 1;
        machine.calls.clear();
        for device in &mut machine.devices {
            device.lost = None;
        }
    });
    core::hurry();
    0
}

/// Writes what happened as lines `key value` into `text`, at most `len` bytes with the terminator; returns the
/// bytes that it takes. Keys: `call.NAME`, `live.allocations`, `live.bytes`, `live.streams`, `live.events`,
/// `live.pinned`, `live.modules`, `live.communicators`, `live.contexts`, `violation`.
///
/// # Safety
/// `text` is writable for `len` bytes.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn simgpu_report(text: *mut c_char, len: usize) -> usize {
    let report = core::with(|machine| {
        let mut lines: Vec<String> =
            machine.calls.iter().map(|(name, count)| format!("call.{name} {count}")).collect();
        let sum = |of: fn(&core::Device) -> u64| machine.devices.iter().map(of).sum::<u64>();
        lines.push(format!("live.allocations {}", sum(|device| device.allocations.len() as u64)));
        lines.push(format!("live.bytes {}", sum(|device| device.used_bytes)));
        lines.push(format!("live.contexts {}", sum(|device| device.retained.into())));
        lines.push(format!("live.streams {}", machine.streams.len()));
        lines.push(format!("live.events {}", machine.events.len()));
        lines.push(format!("live.modules {}", machine.modules.len()));
        lines.push(format!("live.communicators {}", crate::nccl::live()));
        lines.push(format!("live.pinned {}", machine.pinned.len()));
        lines.extend(machine.storage.report());
        lines.extend(machine.violations.iter().map(|violation| format!("violation {violation}")));
        lines.join("\n")
    });
    // SAFETY: the caller's promise.
    unsafe { core::write_text(text, len, &report) };
    report.len() + 1
}
