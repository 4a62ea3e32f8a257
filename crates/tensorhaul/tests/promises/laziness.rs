//! Opening reads headers; a tensor or a slice reads its own bytes: the size of the file does not matter.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use tensorhaul::{Handover, LoadOptions, Model, Request, Select, Slice};

use crate::common::{Folder, evict, in_own_process, memory_bytes, skip};

#[test]
fn a_slice_of_a_file_of_ten_gigabytes_reads_only_its_bytes() {
    in_own_process("laziness::a_slice_of_a_file_of_ten_gigabytes_reads_only_its_bytes", || {
        let folder = Folder::on_disk();
        let path = sparse_file(&folder);
        evict(&path);
        let (read_before, peak_before) = (read_bytes(), memory_bytes("VmHWM"));
        let model = Model::open(&path).unwrap();
        assert_eq!(model.checkpoint().files()[0].len_bytes(), DATA_START + LEN_BYTES);

        // Whole rows are mapped, inner columns read: both are right.
        let row = model.slice("w", &Slice::new([700..701, 0..4])).unwrap();
        assert_eq!(row.as_slice::<f32>().unwrap(), marks(700));
        let columns = model.slice("w", &Slice::new([699..703, 0..4])).unwrap();
        assert_eq!(
            columns.to_vec::<f32>().unwrap(),
            [marks(699), marks(700), marks(701), marks(702)].concat()
        );
        assert_eq!(model.tensor("w").unwrap().bytes().unwrap()[..4], [0; 4]);

        let read = read_bytes() - read_before;
        assert!(read <= 8 << 20, "{read} bytes came from the disk for 80 bytes");
        let cached =
            tensorhaul_io::probe::cached_bytes(&File::open(&path).unwrap(), 0, DATA_START + LEN_BYTES);
        match cached {
            // Each touch of a mapping reads ahead as far as the disk's setting says; 8 MiB are common.
            Some(cached) => assert!(cached <= 64 << 20, "{cached} bytes are in the page cache for 80 bytes"),
            None => skip("this kernel has no cachestat"),
        }
        let peak = memory_bytes("VmHWM") - peak_before;
        assert!(peak <= 32 << 20, "{peak} bytes of memory for 80 bytes");
    });
}

#[test]
fn the_plan_of_a_slice_reads_its_pieces_and_little_around_them() {
    let folder = Folder::on_disk();
    let model = Model::open(sparse_file(&folder)).unwrap();
    for (ranges, payload, read) in [
        (vec![10..14, 0..16], 4 * 64, 4 * 2 * 4096),
        (vec![10..12], 2 * ROW_LEN_BYTES, 2 * ROW_LEN_BYTES + 2 * 4096),
        (vec![1023..1024, COLUMNS - 1..COLUMNS], 4, 2 * 4096),
    ] {
        let mut request = Request::of(Select::All);
        request.slices = vec![("w".to_owned(), Slice::new(ranges.clone()))];
        let promised = *model.plan(&LoadOptions::default().request(request)).unwrap().promised();
        assert_eq!(promised.payload_bytes, payload, "{ranges:?}");
        assert!((payload..=read).contains(&promised.read_bytes), "{ranges:?}: {promised:?}");
    }
}

#[test]
fn a_mapped_load_of_ten_gigabytes_takes_no_memory_until_it_is_touched() {
    in_own_process("laziness::a_mapped_load_of_ten_gigabytes_takes_no_memory_until_it_is_touched", || {
        let folder = Folder::on_disk();
        let path = sparse_file(&folder);
        let before = memory_bytes("VmRSS");
        let loaded =
            Model::open(&path).unwrap().load(&LoadOptions::default().handover(Handover::Mapped)).unwrap();
        assert_eq!((loaded.report.bytes, loaded.report.resident), (LEN_BYTES, false));
        let taken = memory_bytes("VmRSS").saturating_sub(before);
        assert!(taken <= 16 << 20, "{taken} bytes of memory for a load that touched nothing");
    });
}

/// Writes a file of 10.7 GB that is one hole, but for its header and four numbers at the start of a few rows.
fn sparse_file(folder: &Folder) -> PathBuf {
    let mut json = format!(
        "{{\"w\":{{\"dtype\":\"F32\",\"shape\":[{ROWS},{COLUMNS}],\"data_offsets\":[0,{LEN_BYTES}]}}}}"
    );
    while ((8 + json.len()) as u64) < DATA_START {
        json.push(' ');
    }
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json.as_bytes());
    let path = folder.write("sparse.safetensors", &bytes);
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(DATA_START + LEN_BYTES).unwrap();
    for row in 690..710 {
        let bytes: Vec<u8> = marks(row).iter().flat_map(|mark| mark.to_le_bytes()).collect();
        file.write_all_at(&bytes, DATA_START + row * ROW_LEN_BYTES).unwrap();
    }
    file.sync_all().unwrap();
    path
}

fn marks(row: u64) -> [f32; 4] {
    [0.0, 1.0, 2.0, 3.0].map(|column| row as f32 + column / 4.0)
}

/// Bytes that this process fetched from storage.
fn read_bytes() -> u64 {
    let io = fs::read_to_string("/proc/self/io").expect("Linux counts what a process reads");
    let value = io.lines().find_map(|line| line.strip_prefix("read_bytes: "));
    value.and_then(|value| value.parse().ok()).expect("the kernel counts bytes")
}

const DATA_START: u64 = 4096;
const ROWS: u64 = 1024;
const COLUMNS: u64 = 2_621_440;
const ROW_LEN_BYTES: u64 = COLUMNS * 4;
const LEN_BYTES: u64 = ROWS * ROW_LEN_BYTES;
