//! A load takes the memory of its result and its ring, and hardly more, by the process's own accounting.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use tensorhaul::{EngineChoice, Handover, LoadOptions, Model, Preference};

use crate::common::{Folder, evict, in_own_process, memory_bytes};

#[test]
fn a_private_load_through_a_small_ring_peaks_at_result_and_ring() {
    in_own_process("memory::a_private_load_through_a_small_ring_peaks_at_result_and_ring", || {
        peaks_at_result_and_ring(&private().in_place(Preference::Off), false);
    });
}

#[test]
fn a_cold_private_load_through_a_small_ring_peaks_at_result_and_ring() {
    in_own_process("memory::a_cold_private_load_through_a_small_ring_peaks_at_result_and_ring", || {
        peaks_at_result_and_ring(&private().in_place(Preference::Off), true);
    });
}

#[test]
fn a_private_load_in_place_peaks_at_the_result() {
    in_own_process("memory::a_private_load_in_place_peaks_at_the_result", || {
        peaks_at_result_and_ring(&private(), true);
    });
}

#[test]
fn a_private_load_by_mmap_keeps_no_pages_of_the_file_beside_the_result() {
    in_own_process("memory::a_private_load_by_mmap_keeps_no_pages_of_the_file_beside_the_result", || {
        let folder = Folder::on_disk();
        let path = large_file(&folder);
        let loaded = Model::open(&path).unwrap().load(&private().engine(EngineChoice::Mmap)).unwrap();
        // Pages of the file count while they are mapped, so the peak is higher; afterwards they must be gone.
        let now = memory_bytes("VmRSS");
        assert!(
            now <= loaded.report.peak_host_bytes + SLACK_BYTES,
            "{now} bytes are resident after the load"
        );
    });
}

#[test]
fn a_stream_that_is_consumed_takes_no_more_than_the_tensors_kept() {
    in_own_process("memory::a_stream_that_is_consumed_takes_no_more_than_the_tensors_kept", || {
        let folder = Folder::on_disk();
        let path = large_file(&folder);
        let options = private().in_place(Preference::Off).staging_bytes(RING_BYTES);
        let mut sum = 0;
        for ready in Model::open(&path).unwrap().stream(&options).unwrap() {
            let (_, tensor) = ready.unwrap();
            sum += tensor.len_bytes();
        }
        assert_eq!(sum, TENSORS * TENSOR_LEN_BYTES);
        let kept = memory_bytes("RssAnon");
        assert!(kept <= SLACK_BYTES, "{kept} bytes are kept after a stream whose tensors were all dropped");
    });
}

fn peaks_at_result_and_ring(options: &LoadOptions, is_cold: bool) {
    let folder = Folder::on_disk();
    let path = large_file(&folder);
    let model = Model::open(&path).unwrap();
    if is_cold {
        evict(&path);
    }
    let loaded = model.load(&options.clone().staging_bytes(RING_BYTES)).unwrap();
    let peak = memory_bytes("VmHWM");
    let report = &loaded.report;
    assert_eq!(report.bytes, TENSORS * TENSOR_LEN_BYTES);
    assert!(report.peak_staging_bytes <= RING_BYTES, "{report:?}");
    let most = report.bytes + RING_BYTES + SLACK_BYTES;
    assert!(peak <= most, "the process peaked at {peak} bytes, more than {most}: {report:?}");
    assert!(peak >= report.bytes, "the result is resident: {peak}");
    for (name, tensor) in loaded.tensors.iter() {
        let number: u64 = name.split('.').nth(1).unwrap().parse().unwrap();
        assert!(
            tensor.bytes().unwrap() == block(number).repeat((TENSOR_LEN_BYTES / BLOCK_LEN_BYTES) as usize),
            "{name}"
        );
    }
}

/// Writes 300 MB of tensors without ever holding them.
fn large_file(folder: &Folder) -> PathBuf {
    let path = folder.path().join("large.safetensors");
    write(&path).unwrap();
    path
}

fn write(path: &Path) -> std::io::Result<()> {
    let entries = (0..TENSORS).map(|number| {
        let (begin, end) = (number * TENSOR_LEN_BYTES, (number + 1) * TENSOR_LEN_BYTES);
        format!("\"layers.{number}.w\":{{\"dtype\":\"U8\",\"shape\":[{TENSOR_LEN_BYTES}],\"data_offsets\":[{begin},{end}]}}")
    });
    let json = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
    let mut file = BufWriter::new(File::create(path)?);
    file.write_all(&(json.len() as u64).to_le_bytes())?;
    file.write_all(json.as_bytes())?;
    for number in 0..TENSORS {
        let block = block(number);
        (0..TENSOR_LEN_BYTES / BLOCK_LEN_BYTES).try_for_each(|_| file.write_all(&block))?;
    }
    file.into_inner()?.sync_all()
}

/// What a tensor repeats.
fn block(number: u64) -> Vec<u8> {
    (0..BLOCK_LEN_BYTES).map(|index| (index.wrapping_mul(2 * number + 1) >> 3) as u8).collect()
}

fn private() -> LoadOptions {
    LoadOptions::default().handover(Handover::Private)
}

const TENSORS: u64 = 30;

/// 10 MB, and no multiple of a page.
const TENSOR_LEN_BYTES: u64 = 1000 * BLOCK_LEN_BYTES;

const BLOCK_LEN_BYTES: u64 = 10_001;

const RING_BYTES: u64 = 16 << 20;

/// What a process may take beside the result and the ring.
const SLACK_BYTES: u64 = 64 << 20;
