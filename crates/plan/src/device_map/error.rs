//! Why a device map cannot be one, or cannot serve.

use std::fmt;

use crate::header::json::Quoted;
use crate::placement::DeviceId;

/// Why a device map cannot be one, or cannot serve a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceMapError {
    /// Text that is not the JSON of a device map.
    NotJson {
        /// Where it stops being that, in bytes.
        at_bytes: u64,
        /// What is wrong there.
        what: String,
    },
    /// A map without entries.
    Empty,
    /// Two entries with the same pattern.
    RepeatedPattern {
        /// The pattern.
        pattern: String,
    },
    /// An entry without devices.
    NoDevice {
        /// The entry.
        pattern: String,
    },
    /// An entry with a device twice.
    DeviceTwice {
        /// The entry.
        pattern: String,
        /// The device.
        device: DeviceId,
    },
    /// Text that names no device.
    UnknownDevice {
        /// The entry.
        pattern: String,
        /// The text.
        text: String,
    },
    /// An ordinal where no vendor is known that it could be of.
    WhoseOrdinal {
        /// The entry.
        pattern: String,
        /// The ordinal.
        ordinal: u64,
    },
    /// Tensors that are to stay on disk.
    OnDisk {
        /// The entry.
        pattern: String,
    },
    /// A pattern that is not a glob.
    BadGlob {
        /// The pattern.
        pattern: String,
        /// What is wrong with it.
        what: String,
    },
    /// An entry that is about no tensor.
    NothingMatches {
        /// The entry.
        pattern: String,
        /// How many tensors there are.
        tensor_count: usize,
    },
    /// Tensors that no entry is about.
    NotMapped {
        /// The first of them.
        names: Vec<String>,
        /// How many there are.
        count: usize,
    },
    /// No devices to share tensors out among.
    NoDevices,
    /// Tensors that do not fit on the devices, layer by layer.
    DoesNotFit {
        /// Bytes of all tensors.
        needed_bytes: u64,
        /// Bytes of what is not split and is the largest: a layer, or what has to be with the first or the last.
        largest_bytes: u64,
        /// What that is.
        largest: String,
        /// What each device can take.
        room: Vec<(DeviceId, u64)>,
    },
}

impl fmt::Display for DeviceMapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entry = |pattern| format!("device map entry {}", Quoted(pattern));
        match self {
            DeviceMapError::NotJson { at_bytes, what } => {
                write!(f, "not a device map: {what} (byte {at_bytes})")
            }
            DeviceMapError::Empty => {
                f.write_str("a device map without entries places nothing; \"\" is the entry for everything")
            }
            DeviceMapError::RepeatedPattern { pattern } => write!(f, "{} is there twice", entry(pattern)),
            DeviceMapError::NoDevice { pattern } => write!(f, "{} names no device", entry(pattern)),
            DeviceMapError::DeviceTwice { pattern, device } => {
                write!(f, "{} names {device} twice", entry(pattern))
            }
            DeviceMapError::UnknownDevice { pattern, text } => {
                let (entry, text) = (entry(pattern), Quoted(text));
                write!(f, "{entry}: {text} names no device; cpu, host, cuda:0, rocm:0 and ordinals do")
            }
            DeviceMapError::WhoseOrdinal { pattern, ordinal } => {
                let entry = entry(pattern);
                write!(f, "{entry}: {ordinal} is no vendor's; write cuda:{ordinal} or rocm:{ordinal}")
            }
            DeviceMapError::OnDisk { pattern } => {
                let entry = entry(pattern);
                write!(f, "{entry}: a load leaves nothing on disk; map it to cpu, or do not select it")
            }
            DeviceMapError::BadGlob { pattern, what } => {
                write!(f, "{} is not a glob: {what}", entry(pattern))
            }
            DeviceMapError::NothingMatches { pattern, tensor_count } => {
                write!(f, "{} is about none of the {tensor_count} tensors", entry(pattern))
            }
            DeviceMapError::NotMapped { names, count } => {
                let more = if *count > names.len() { ", ..." } else { "" };
                let tensors = if *count == 1 { "tensor" } else { "tensors" };
                write!(f, "no entry of the device map is about {count} {tensors}: {}{more}", names.join(", "))
            }
            DeviceMapError::NoDevices => f.write_str("there is no device to share the tensors out among"),
            DeviceMapError::DoesNotFit { needed_bytes, largest_bytes, largest, room } => {
                write!(
                    f,
                    "{needed_bytes} bytes in whole layers (the largest is {largest:?}, {largest_bytes} bytes) do not fit:"
                )?;
                let mut room = room.iter().map(|(device, bytes)| format!(" {device} takes {bytes}"));
                f.write_str(&room.by_ref().collect::<Vec<_>>().join(","))
            }
        }
    }
}

impl std::error::Error for DeviceMapError {}
