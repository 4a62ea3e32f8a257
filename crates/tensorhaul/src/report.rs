//! What a load did, beside what its plan promised.

use std::collections::BTreeMap;

use serde::Serialize;
use tensorhaul_plan::Promised;

/// What a load did.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// Bytes of the tensors handed over.
    pub bytes: u64,
    /// Number of tensors handed over.
    pub tensors: u64,
    /// From the call until every byte was where it belongs; for a lazy mapped load, until the mapping stood.
    pub seconds: f64,
    /// `bytes` by `seconds`, in 1e9 bytes a second.
    pub gb_per_s: f64,
    /// Where the tensors are; devices of a device map with `, ` between them.
    pub device: String,
    /// Who read: `mmap`, `pread`, `io-uring`, `cufile`, `hipfile`, `memory`; several with a `+` between them.
    pub engine: String,
    /// `mapped` or `private`.
    pub handover: &'static str,
    /// Whether every byte was in memory when the load returned.
    pub resident: bool,
    /// Bytes that the page cache held when the load began; 0 for a lazy mapped load, which did not ask.
    pub bytes_hot: u64,
    /// Bytes that it did not hold.
    pub bytes_cold: u64,
    /// Bytes read past the page cache.
    pub bytes_direct: u64,
    /// Bytes that were read before the device was ready for them; at most the staging ring.
    pub bytes_ahead: u64,
    /// Bytes that landed in the tensors' own memory at once.
    pub bytes_in_place: u64,
    /// Bytes that storage wrote straight into a device's memory, past the host.
    pub bytes_direct_storage: u64,
    /// The most staging memory that was in use.
    pub peak_staging_bytes: u64,
    /// Host memory the load took: the result where it is on the host, and the staging buffers that were in use.
    pub peak_host_bytes: u64,
    /// What the plan promised; a mapped load promises its payload and no memory of its own.
    pub promised: Promised,
    /// Read jobs, requests to the system, and system calls that reading took.
    pub reads: u64,
    /// Requests that engines gave to the system.
    pub requests: u64,
    /// System calls that engines made to read.
    pub system_calls: u64,
    /// Where the seconds went.
    pub phases: Phases,
    /// What of it was whose, where a device map said where tensors go.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceReport>,
    /// What could not be done as preferred, and why.
    pub fallbacks: Vec<Fallback>,
    /// xxh3-64 of every tensor's bytes by its name, 16 hexadecimal digits, if asked for. Copies on several devices were all summed and are
    /// the same; of parts that ranks have under one name, those that differ from the first device's are under `name on device`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checksums: Option<BTreeMap<String, String>>,
}

impl Report {
    /// Begins a report with what is the same for every load.
    pub(crate) fn of(seconds: f64, bytes: u64) -> Report {
        let gb_per_s = if seconds > 0.0 { bytes as f64 / seconds / 1e9 } else { 0.0 };
        Report { seconds, gb_per_s, bytes, ..Report::default() }
    }
}

/// Where the seconds of a load went; of several devices, which are made ready beside each other, the longest. The first five follow each other and make up `seconds`; the next five are fixed
/// costs, which run beside them.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct Phases {
    /// Asking what the page cache holds and how files can be read, and finding the device. With direct storage, opening the device and
    /// the library, and trying the files, too.
    pub probe_seconds: f64,
    /// Planning.
    pub plan_seconds: f64,
    /// Taking staging memory and setting up engines. Making the device ready too, where reads cannot begin without:
    /// where they land in its memory, and where its driver has refused to pin staging memory before.
    pub prepare_seconds: f64,
    /// From then to the first byte.
    pub first_byte_seconds: f64,
    /// From the first byte to the last.
    pub read_seconds: f64,
    /// Loading and initializing the driver, beside the probe; about 0 but for the first load of a process.
    pub driver_seconds: f64,
    /// Making the device's context, beside the plan and the reads; 0 when an earlier load left it open.
    pub context_seconds: f64,
    /// Allocating the result, beside the reads.
    pub allocate_seconds: f64,
    /// Pinning the staging ring, beside the allocation and the reads; about 0 when an earlier load left it.
    pub pin_seconds: f64,
    /// Loading kernels, before the first copy; 0 where nothing is dequantized, and about 0 when an earlier load left them.
    pub module_seconds: f64,
    /// Opening direct storage and trying the files that it is to read, within `probe_seconds`; 0 where it is not asked for.
    pub direct_storage_seconds: f64,
    /// How much of the context, the allocation and the pinning passed while reads landed: from their beginning to the
    /// last that landed before the device was ready. A ring that is full waits, and hides nothing more.
    pub hidden_seconds: f64,
    /// From the first byte read to the first byte seen to be copied to the device; 0 when none was.
    pub first_copy_seconds: f64,
}

/// What a load did on one of its devices.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct DeviceReport {
    /// Which device.
    pub device: String,
    /// Number of tensors handed over on it.
    pub tensors: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Those of them that came from another device instead of from storage.
    pub bytes_from_peers: u64,
    /// Memory that the load took of it: the result, rounding included.
    pub target_bytes: u64,
    /// Memory that it took for sources of operations, which is free again.
    pub transient_bytes: u64,
    /// Reads that were done for it; those that bring bytes for several devices are counted on the first.
    pub reads: u64,
    /// Copies out of staging buffers into its memory.
    pub copies: u64,
    /// The most memory of its own staging ring that was in use.
    pub peak_staging_bytes: u64,
    /// The host's memory node that its staging ring was put on, nearest to it; `None` where nobody knows of one, and where the driver
    /// put the ring.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub staging_node: Option<u32>,
    /// As in [`Phases`], of this device alone.
    pub context_seconds: f64,
    /// As above.
    pub allocate_seconds: f64,
    /// As above.
    pub pin_seconds: f64,
    /// As above.
    pub module_seconds: f64,
}

/// Something that could not be done as preferred.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fallback {
    /// What was done instead of what.
    pub what: String,
    /// Why.
    pub why: String,
}

impl Fallback {
    pub(crate) fn new(what: impl Into<String>, why: impl ToString) -> Fallback {
        Fallback { what: what.into(), why: why.to_string() }
    }
}
