//! Checkpoints with bytes, and a naive machine that does what a plan says.

use std::collections::BTreeMap;
use std::sync::Arc;

use tensorhaul_plan::header::{NewTensor, encode};
use tensorhaul_plan::plan::Target;
use tensorhaul_plan::{Checkpoint, Dtype, File, Header, Plan, SliceRange};

/// A tensor to write: name, dtype, shape.
pub(crate) type Spec = (String, Dtype, Vec<u64>);

/// Files in memory and the checkpoint of their headers.
pub(crate) struct World {
    pub(crate) files: Vec<Vec<u8>>,
    pub(crate) checkpoint: Arc<Checkpoint>,
}

pub(crate) fn world(files: &[Vec<Spec>], data_align_bytes: u64) -> World {
    let mut bytes = Vec::new();
    let mut entries = Vec::new();
    for (number, specs) in files.iter().enumerate() {
        let tensors: Vec<_> =
            specs.iter().map(|(name, dtype, shape)| NewTensor { name, dtype: *dtype, shape }).collect();
        let mut file = encode(&tensors, &BTreeMap::new(), data_align_bytes).unwrap();
        let json_len = file.len();
        let data_len: u64 =
            tensors.iter().map(|t| t.dtype.len_bytes(t.shape.iter().product()).unwrap()).sum();
        let salt = number as u64 * 7919;
        file.extend((0..data_len).map(|at| ((at + salt).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8));
        let header = Header::parse(&file[8..json_len], file.len() as u64).unwrap();
        entries.push(File::new(format!("f{number}.safetensors"), header));
        bytes.push(file);
    }
    World { files: bytes, checkpoint: Arc::new(Checkpoint::new(entries).unwrap()) }
}

/// Does what the plan says, read by read in the given order, and returns the arenas.
pub(crate) fn execute(world: &World, plan: &Plan, order: impl Iterator<Item = usize>) -> Vec<Vec<u8>> {
    let mut arenas: Vec<_> = plan.arenas().iter().map(|arena| vec![0xee; arena.len_bytes as usize]).collect();
    for read in order.map(|index| &plan.reads()[index]) {
        let extent = read.extent;
        let file = &world.files[extent.file as usize];
        let bytes = &file[extent.offset_bytes as usize..extent.end_bytes() as usize];
        let pieces: Vec<u8>;
        let bytes = match read.stride {
            None => bytes,
            Some(stride) => {
                let whole = bytes.chunks(stride.stride_bytes as usize);
                pieces = whole.flat_map(|chunk| &chunk[..stride.piece_len_bytes as usize]).copied().collect();
                &pieces
            }
        };
        assert_eq!(bytes.len() as u64, read.len_bytes());
        match &read.target {
            Target::InPlace(place) => {
                arenas[place.arena as usize][place.offset_bytes as usize..][..bytes.len()]
                    .copy_from_slice(bytes);
            }
            Target::Staged { .. } => {
                for copy in plan.copies(read) {
                    let target = &mut arenas[copy.target.arena as usize];
                    for (from, to) in copy.pieces() {
                        let source = &bytes[from as usize..][..copy.len_bytes as usize];
                        target[to as usize..][..source.len()].copy_from_slice(source);
                    }
                }
            }
        }
    }
    arenas
}

/// The bytes a slice keeps, element by element.
pub(crate) fn naive(world: &World, name: &str, slice: Option<&[SliceRange]>) -> Vec<u8> {
    let tensor = world.checkpoint.find(name).unwrap();
    let file = &world.files[tensor.file as usize];
    let bytes = &file[tensor.file_offset_bytes as usize..][..tensor.info.len_bytes() as usize];
    let Some(ranges) = slice else { return bytes.to_vec() };
    let width = (tensor.info.dtype.bits() / 8) as usize;
    let kept = |flat: u64| {
        let mut rest = flat;
        (0..tensor.info.shape.len()).rev().all(|dim| {
            let index = rest % tensor.info.shape[dim];
            rest /= tensor.info.shape[dim];
            ranges.get(dim).is_none_or(|range| {
                (range.start..range.stop).contains(&index) && (index - range.start).is_multiple_of(range.step)
            })
        })
    };
    let flats = 0..tensor.info.shape.iter().product();
    flats
        .filter(|flat| kept(*flat))
        .flat_map(|flat| &bytes[flat as usize * width..][..width])
        .copied()
        .collect()
}
