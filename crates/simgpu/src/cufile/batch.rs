//! Reads in batches: done when they are submitted, and told when they are asked for.

use std::ffi::{c_int, c_uint, c_void};
use std::ptr;

use super::{INTERNAL, INVALID_VALUE, Status, Vendor, read};
use crate::core;

#[repr(C)]
pub(crate) struct BatchRead {
    mode: c_int,
    base: *mut c_void,
    file_offset: i64,
    base_offset: i64,
    len: usize,
    handle: *mut c_void,
    operation: c_int,
    cookie: *mut c_void,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct BatchEvent {
    cookie: *mut c_void,
    status: c_int,
    result: isize,
}

// SAFETY: the cookie is the caller's, and never followed.
unsafe impl Send for BatchEvent {}

pub(super) unsafe fn set_up(name: &'static str, handle: *mut *mut c_void, count: c_uint) -> Status {
    super::status(name, |machine| {
        if count > machine.config.direct_batch {
            return Err(INVALID_VALUE);
        }
        let number = machine.new_handle();
        machine.storage.batches.insert(number, Vec::new());
        // SAFETY: the caller passes a pointer that may be written.
        unsafe { handle.write(ptr::without_provenance_mut(number)) };
        Ok(())
    })
}

pub(super) unsafe fn submit(
    vendor: Vendor,
    names: [&'static str; 2],
    handle: *mut c_void,
    count: c_uint,
    reads: *mut BatchRead,
) -> Status {
    let submitted = super::status(names[0], |machine| match machine.storage.batches.get(&handle.addr()) {
        Some(_) => Ok(()),
        None => Err(INVALID_VALUE),
    });
    if submitted.code != 0 {
        return submitted;
    }
    for number in 0..count as usize {
        // SAFETY: the caller passes that many.
        let entry = unsafe { reads.add(number) };
        // SAFETY: as above.
        let entry = unsafe { entry.read() };
        let offsets = [entry.file_offset, entry.base_offset];
        let result = match (entry.mode, entry.operation) {
            (1, 0) => read(vendor, names[1], entry.handle, entry.base, entry.len, offsets),
            _ => -(INVALID_VALUE as isize),
        };
        let status = if result < 0 { BATCH_FAILED } else { BATCH_COMPLETE };
        let event = BatchEvent { cookie: entry.cookie, status, result };
        core::with(|machine| machine.storage.batches.entry(handle.addr()).or_default().push(event));
    }
    submitted
}

pub(super) unsafe fn status(
    vendor: Vendor,
    name: &'static str,
    handle: *mut c_void,
    least: c_uint,
    count: *mut c_uint,
    events: *mut BatchEvent,
    time: *const libc::timespec,
) -> Status {
    super::status(name, |machine| {
        is_implemented(vendor)?;
        let done = machine.storage.batches.get_mut(&handle.addr()).ok_or(INVALID_VALUE)?;
        // SAFETY: the caller passes a pointer that may be read.
        let room = unsafe { count.read() } as usize;
        // Everything is done when it is submitted, so that what a caller waits for longer never comes.
        if done.len() < least as usize && time.is_null() {
            machine.violations.push(format!("{name} waits for reads that were not submitted"));
            return Err(INVALID_VALUE);
        }
        let (told, times_left) = &mut machine.config.direct_told;
        if let (Some(first), 1..) = (done.last(), &*times_left) {
            *times_left -= 1;
            let event = BatchEvent { status: *told, result: 0, ..*first };
            // SAFETY: the caller has room for one at least.
            unsafe { events.write(event) };
            // SAFETY: the caller passes a pointer that may be written.
            unsafe { count.write(1) };
            return Ok(());
        }
        // The latest first: nobody may count on an order.
        let given = done.len().min(room);
        for number in 0..given {
            let event = done.pop().ok_or(INVALID_VALUE)?;
            // SAFETY: the caller has room for that many.
            let slot = unsafe { events.add(number) };
            // SAFETY: as above.
            unsafe { slot.write(event) };
        }
        // SAFETY: the caller passes a pointer that may be written.
        unsafe { count.write(given as c_uint) };
        Ok(())
    })
}

pub(super) fn cancel(vendor: Vendor, name: &'static str) -> Status {
    super::status(name, |_| is_implemented(vendor))
}

pub(super) fn destroy(name: &'static str, handle: *mut c_void) {
    let _ = super::status(name, |machine| {
        machine.storage.check_no_reads(&mut machine.violations, name);
        machine.storage.batches.remove(&handle.addr());
        Ok(())
    });
}

/// AMD's functions that tell of reads, and end batches, are there and do nothing (hipFile 0.2).
fn is_implemented(vendor: Vendor) -> Result<(), i32> {
    if vendor == Vendor::Amd { Err(INTERNAL) } else { Ok(()) }
}

const BATCH_COMPLETE: c_int = 0x10;
const BATCH_FAILED: c_int = 0x40;
