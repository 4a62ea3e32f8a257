//! Reads from an AMD code object what a driver tells about it: what it is for, the kernels, the size of their parameters.
//!
//! # Source
//! ELF-64 object file format, version 1.5: headers and notes. LLVM, "User Guide for AMDGPU Backend": code object metadata
//! of version 5. MessagePack specification.

use std::collections::BTreeMap;

use crate::kernels::Entry;

/// What a code object says of itself.
pub(crate) struct CodeObject {
    /// As in `amdgcn-amd-amdhsa--gfx942`, with `:feature+` for what it insists on.
    target: String,
    pub(crate) entries: Vec<Entry>,
}

impl CodeObject {
    /// Reads a code object, which has no length but what its headers tell; `None` when this is none.
    ///
    /// # Safety
    /// `image` points to a code object, or to as many bytes as the header of one has.
    pub(crate) unsafe fn read(image: *const u8) -> Option<CodeObject> {
        // SAFETY: the caller's promise.
        let header = unsafe { std::slice::from_raw_parts(image, HEADER_LEN) };
        let (at, entry_len, count) = program_headers(header)?;
        let table_len = at.checked_add(entry_len.checked_mul(count)?)?;
        // SAFETY: a header with the right signature is of a whole code object, which its program headers are a part of.
        let headers = unsafe { std::slice::from_raw_parts(image, table_len) };
        let segments = headers[at..].chunks_exact(entry_len).map(segment).collect::<Option<Vec<_>>>()?;
        let len = segments.iter().map(|segment| segment.end).max()?;
        // SAFETY: as above: so are the segments.
        CodeObject::parse(unsafe { std::slice::from_raw_parts(image, len) }, &segments)
    }

    fn parse(image: &[u8], segments: &[Segment]) -> Option<CodeObject> {
        let notes = segments.iter().find(|segment| segment.kind == SEGMENT_NOTE)?;
        let metadata = Value::read(&mut metadata_note(&image[notes.start..notes.end])?)?;
        let kernels = metadata.field("amdhsa.kernels")?.items()?;
        Some(CodeObject {
            target: metadata.field("amdhsa.target")?.text()?.to_owned(),
            entries: kernels.iter().map(entry).collect::<Option<_>>()?,
        })
    }

    /// Tells whether it runs on a device that calls itself, as HIP does, `gfx942:sramecc+:xnack-`.
    pub(crate) fn is_for(&self, device: &str) -> bool {
        let Some((_, target)) = self.target.split_once("--") else { return false };
        let (mut wants, mut has) = (target.split(':'), device.split(':'));
        wants.next() == has.next() && wants.all(|feature| device.split(':').any(|had| had == feature))
    }
}

/// A part of the file.
struct Segment {
    kind: u64,
    start: usize,
    end: usize,
}

/// Returns where program headers are, how long each is, and how many there are.
fn program_headers(header: &[u8]) -> Option<(usize, usize, usize)> {
    let is_code_object =
        header.starts_with(b"\x7fELF\x02\x01\x01\x40") && number(header, 18, 2)? == MACHINE_AMDGPU;
    let place =
        (number(header, 32, 8)? as usize, number(header, 54, 2)? as usize, number(header, 56, 2)? as usize);
    (is_code_object && place.1 == PROGRAM_HEADER_LEN).then_some(place)
}

fn segment(header: &[u8]) -> Option<Segment> {
    let start = number(header, 8, 8)? as usize;
    let end = start.checked_add(number(header, 32, 8)? as usize)?;
    Some(Segment { kind: number(header, 0, 4)?, start, end })
}

/// Returns the metadata among notes.
fn metadata_note(mut notes: &[u8]) -> Option<&[u8]> {
    loop {
        let (name_len, len) = (number(notes, 0, 4)? as usize, number(notes, 4, 4)? as usize);
        let start = 12 + name_len.next_multiple_of(4);
        if notes.get(12..12 + name_len)? == b"AMDGPU\0" && number(notes, 8, 4)? == NOTE_METADATA {
            return notes.get(start..start + len);
        }
        notes = notes.get(start + len.next_multiple_of(4)..)?;
    }
}

/// Reads a little-endian number.
fn number(bytes: &[u8], at: usize, len: usize) -> Option<u64> {
    let mut word = [0; 8];
    word[..len].copy_from_slice(bytes.get(at..at + len)?);
    Some(u64::from_le_bytes(word))
}

/// Reads a kernel. What its source names comes first; what the compiler wants besides is hidden.
fn entry(kernel: &Value) -> Option<Entry> {
    let mut params_len = 0;
    for argument in kernel.field(".args")?.items()? {
        if !argument.field(".value_kind")?.text()?.starts_with("hidden_") {
            params_len = argument.field(".offset")?.number()? + argument.field(".size")?.number()?;
        }
    }
    let fits = params_len <= kernel.field(".kernarg_segment_size")?.number()?;
    fits.then_some(Entry { name: kernel.field(".name")?.text()?.to_owned(), params_len })
}

/// As much of MessagePack as metadata uses.
enum Value {
    Number(u64),
    Text(String),
    Items(Vec<Value>),
    Fields(BTreeMap<String, Value>),
    /// What nobody here asks for.
    Other,
}

impl Value {
    fn read(bytes: &mut &[u8]) -> Option<Value> {
        let tag = take(bytes, 1)? as u8;
        Some(match tag {
            0x00..=0x7f => Value::Number(tag.into()),
            0xcc..=0xcf => Value::Number(take(bytes, 1 << (tag - 0xcc))?),
            0xa0..=0xbf => Value::read_text(bytes, (tag & 0x1f).into())?,
            0xd9..=0xdb => {
                let len = take(bytes, 1 << (tag - 0xd9))?;
                Value::read_text(bytes, len)?
            }
            0x90..=0x9f => Value::read_items(bytes, (tag & 0x0f).into())?,
            0xdc..=0xdd => {
                let count = take(bytes, 2 << (tag - 0xdc))?;
                Value::read_items(bytes, count)?
            }
            0x80..=0x8f => Value::read_fields(bytes, (tag & 0x0f).into())?,
            0xde..=0xdf => {
                let count = take(bytes, 2 << (tag - 0xde))?;
                Value::read_fields(bytes, count)?
            }
            0xc0 | 0xc2 | 0xc3 => Value::Other,
            _ => return None,
        })
    }

    fn read_text(bytes: &mut &[u8], len: u64) -> Option<Value> {
        let (text, rest) = bytes.split_at_checked(len as usize)?;
        *bytes = rest;
        Some(Value::Text(std::str::from_utf8(text).ok()?.to_owned()))
    }

    fn read_items(bytes: &mut &[u8], count: u64) -> Option<Value> {
        (0..count).map(|_| Value::read(bytes)).collect::<Option<_>>().map(Value::Items)
    }

    fn read_fields(bytes: &mut &[u8], count: u64) -> Option<Value> {
        let field = |_| Some((Value::read(bytes)?.text()?.to_owned(), Value::read(bytes)?));
        (0..count).map(field).collect::<Option<_>>().map(Value::Fields)
    }

    fn number(&self) -> Option<u64> {
        if let Value::Number(number) = self { Some(*number) } else { None }
    }

    fn text(&self) -> Option<&str> {
        if let Value::Text(text) = self { Some(text) } else { None }
    }

    fn items(&self) -> Option<&[Value]> {
        if let Value::Items(items) = self { Some(items) } else { None }
    }

    fn field(&self, name: &str) -> Option<&Value> {
        if let Value::Fields(fields) = self { fields.get(name) } else { None }
    }
}

/// Takes a big-endian number off the front.
fn take(bytes: &mut &[u8], len: usize) -> Option<u64> {
    let (front, rest) = bytes.split_at_checked(len)?;
    *bytes = rest;
    Some(front.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

const HEADER_LEN: usize = 64;
const PROGRAM_HEADER_LEN: usize = 56;
/// `EM_AMDGPU`.
const MACHINE_AMDGPU: u64 = 224;
/// `PT_NOTE`.
const SEGMENT_NOTE: u64 = 4;
/// `NT_AMDGPU_METADATA`.
const NOTE_METADATA: u64 = 32;
