//! Plans, executed naively over made-up files: every byte lands where it belongs, whatever the order.

#![allow(clippy::unwrap_used, reason = "a failed expectation is the test's own report")]

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use proptest::prelude::*;
use tensorhaul_plan::header::NewTensor;
use tensorhaul_plan::header::encode;
use tensorhaul_plan::plan::{Machine, Target};
use tensorhaul_plan::{Checkpoint, DeviceId, Dtype, File, Header, Plan, Request, Select, Slice};

/// A tensor to write: name, dtype, shape.
type Spec = (String, Dtype, Vec<u64>);

/// Files in memory and the checkpoint of their headers.
struct World {
    files: Vec<Vec<u8>>,
    checkpoint: Arc<Checkpoint>,
}

fn world(files: &[Vec<Spec>], data_align_bytes: u64) -> World {
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
fn execute(world: &World, plan: &Plan, order: impl Iterator<Item = usize>) -> Vec<Vec<u8>> {
    let mut arenas: Vec<_> = plan.arenas().iter().map(|arena| vec![0xee; arena.len_bytes as usize]).collect();
    for read in order.map(|index| &plan.reads()[index]) {
        let extent = read.extent;
        let file = &world.files[extent.file as usize];
        let bytes = &file[extent.offset_bytes as usize..extent.end_bytes() as usize];
        match &read.target {
            Target::InPlace(place) => {
                arenas[place.arena as usize][place.offset_bytes as usize..][..bytes.len()]
                    .copy_from_slice(bytes);
            }
            Target::Staged { .. } => {
                for copy in plan.copies(read) {
                    let source = &bytes[copy.source_offset_bytes as usize..][..copy.len_bytes as usize];
                    let target = &mut arenas[copy.target.arena as usize][copy.target.offset_bytes as usize..];
                    target[..source.len()].copy_from_slice(source);
                }
            }
        }
    }
    arenas
}

/// The bytes a slice keeps, element by element.
fn naive(world: &World, name: &str, slice: Option<&[Range<u64>]>) -> Vec<u8> {
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
            ranges.get(dim).is_none_or(|range| range.contains(&index))
        })
    };
    let flats = 0..tensor.info.shape.iter().product();
    flats
        .filter(|flat| kept(*flat))
        .flat_map(|flat| &bytes[flat as usize * width..][..width])
        .copied()
        .collect()
}

fn check(world: &World, request: &Request, machine: &Machine) {
    let plan = Plan::new(&world.checkpoint, request, machine).unwrap();
    let slices: BTreeMap<_, _> =
        request.slices.iter().map(|(name, slice)| (name.as_str(), slice.ranges())).collect();

    // Reads are aligned, inside their file, no longer than a buffer, in schedule order.
    assert!(plan.reads().is_sorted_by_key(|read| (read.extent.file, read.extent.offset_bytes)));
    for read in plan.reads() {
        let (extent, align) = (read.extent, machine.direct_align_bytes);
        let file_len = world.files[extent.file as usize].len() as u64;
        assert!(extent.len_bytes > 0 && extent.len_bytes <= machine.buffer_len_bytes);
        assert!(extent.offset_bytes.is_multiple_of(align));
        assert!(extent.end_bytes().is_multiple_of(align) || extent.end_bytes() == file_len);
        assert!(extent.end_bytes() <= file_len);
        if let Target::InPlace(place) = read.target {
            let arena = plan.arenas()[place.arena as usize].len_bytes;
            assert_eq!(place.offset_bytes % align, 0, "storage writes to an aligned address");
            // Also the rest of the last, partial sector has room.
            assert!(place.offset_bytes + extent.len_bytes.next_multiple_of(align) <= arena);
        }
    }

    // Every byte is right, whichever read comes last.
    let forward = execute(world, &plan, 0..plan.reads().len());
    let backward = execute(world, &plan, (0..plan.reads().len()).rev());
    for tensor in plan.tensors() {
        let name = plan.name(tensor);
        let expected = naive(world, name, slices.get(name).copied());
        assert_eq!(tensor.len_bytes, expected.len() as u64);
        let arena = &plan.arenas()[tensor.place.arena as usize];
        assert_eq!(arena.is_external, request.external.iter().any(|external| external == name));
        if arena.is_external {
            assert_eq!((arena.len_bytes, tensor.place.offset_bytes), (tensor.len_bytes, 0));
        }
        if expected.is_empty() {
            continue;
        }
        assert!(tensor.place.offset_bytes.is_multiple_of(tensor.dtype.align_bytes()), "{name}");
        for arenas in [&forward, &backward] {
            let arena = &arenas[tensor.place.arena as usize];
            let found = &arena[tensor.place.offset_bytes as usize..][..expected.len()];
            assert!(found == expected, "{name} is not what the file holds");
        }
    }

    // A tensor is ready when its reads are done, and not before: without any one of them it is not right.
    let mut missing: Vec<u32> = plan.tensors().iter().map(|tensor| tensor.read_count).collect();
    for read in plan.reads() {
        for tensor in read.tensors.clone() {
            let tensor = tensor as usize;
            missing[tensor] -= u32::from(plan.tensors()[tensor].len_bytes > 0);
        }
    }
    assert!(missing.iter().all(|missing| *missing == 0));

    // The promise is the sum.
    let promised = plan.promised();
    assert_eq!(promised.payload_bytes, plan.tensors().iter().map(|tensor| tensor.len_bytes).sum::<u64>());
    assert_eq!(promised.payload_bytes, plan.reads().iter().map(|read| plan.payload_bytes(read)).sum::<u64>());
    assert_eq!(promised.read_bytes, plan.reads().iter().map(|read| read.extent.len_bytes).sum::<u64>());
    assert!(promised.peak_staging_bytes <= machine.buffer_len_bytes * u64::from(machine.buffer_count));
}

fn spec() -> impl Strategy<Value = (u8, Dtype, Vec<u64>)> {
    let dtype = prop_oneof![Just(Dtype::U8), Just(Dtype::Bf16), Just(Dtype::F32), Just(Dtype::F64)];
    let shape = prop_oneof![
        4 => proptest::collection::vec(0u64..40, 0..3),
        1 => (1u64..60, 1000u64..3000).prop_map(|(rows, columns)| vec![rows, columns]),
    ];
    (0u8..5, dtype, shape)
}

fn files() -> impl Strategy<Value = Vec<Vec<Spec>>> {
    proptest::collection::vec(proptest::collection::vec(spec(), 0..12), 1..4).prop_map(|files| {
        let name = |file: usize, index: usize, layer: u8| match layer {
            0 => format!("t{file}.{index}.w"),
            layer => format!("model.layers.{layer}.experts.{}.t{file}_{index}", index % 3),
        };
        let file = |(file, specs): (usize, Vec<(u8, Dtype, Vec<u64>)>)| {
            let tensor = |(index, (layer, dtype, shape))| (name(file, index, layer), dtype, shape);
            specs.into_iter().enumerate().map(tensor).collect()
        };
        files.into_iter().enumerate().map(file).collect()
    })
}

fn machine() -> impl Strategy<Value = Machine> {
    (1u64..40, 1u32..9, 0u32..4, any::<bool>()).prop_map(|(pages, buffer_count, align, in_place)| Machine {
        buffer_len_bytes: pages * 4096,
        buffer_count,
        direct_align_bytes: [1, 512, 4096, 4096][align as usize],
        in_place,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_byte_lands_where_it_belongs(
        files in files(),
        machine in machine(),
        data_align in prop_oneof![Just(8u64), Just(64), Just(4096)],
        keep in proptest::collection::vec(any::<bool>(), 64),
        cuts in proptest::collection::vec((0u64..60, 0u64..60), 64),
    ) {
        let world = world(&files, data_align);
        let names: Vec<String> = world.checkpoint.tensors().map(|tensor| tensor.info.name.to_owned()).collect();
        let kept: Vec<String> =
            names.iter().zip(keep.iter().cycle()).filter(|(_, keep)| **keep).map(|(name, _)| name.clone()).collect();
        check(&world, &Request::all(), &machine);
        check(&world, &Request::of(Select::Names(kept.clone())), &machine);

        let mut sliced = Request::of(Select::Names(kept.clone()));
        for (index, name) in kept.iter().enumerate().step_by(2) {
            let shape = world.checkpoint.find(name).unwrap().info.shape;
            let ranges: Vec<Range<u64>> = shape
                .iter()
                .enumerate()
                .map(|(dim, len)| {
                    let (a, b) = cuts[(index * 3 + dim) % cuts.len()];
                    a.min(b).min(*len)..a.max(b).min(*len)
                })
                .collect();
            sliced.slices.push((name.clone(), Slice::new(ranges)));
        }
        check(&world, &sliced, &machine);
        sliced.external = kept.iter().step_by(3).cloned().collect();
        check(&world, &sliced, &machine);
    }
}

fn tiny() -> World {
    let spec = |name: &str, dtype, shape: &[u64]| (name.to_owned(), dtype, shape.to_vec());
    world(
        &[
            vec![
                spec("model.embed_tokens.weight", Dtype::Bf16, &[512, 96]),
                spec("model.layers.0.mlp.weight", Dtype::Bf16, &[1024, 1100]),
                spec("model.layers.0.norm.weight", Dtype::Bf16, &[96]),
                spec("model.layers.1.mlp.weight", Dtype::Bf16, &[1024, 1100]),
            ],
            vec![
                spec("flags", Dtype::U8, &[3]),
                spec("model.norm.weight", Dtype::F32, &[96]),
                spec("none", Dtype::F32, &[0, 96]),
                spec("scale", Dtype::F32, &[]),
            ],
        ],
        8,
    )
}

#[test]
fn a_plan_for_the_host_reads_as_text() {
    let machine =
        Machine { buffer_len_bytes: 1 << 20, buffer_count: 16, direct_align_bytes: 512, in_place: true };
    insta::assert_snapshot!(Plan::new(&tiny().checkpoint, &Request::all(), &machine).unwrap());
}

#[test]
fn a_plan_for_an_accelerator_stages_everything() {
    let mut request = Request::all();
    request.device = DeviceId::Cuda(0);
    request.slices = vec![("model.layers.1.mlp.weight".to_owned(), Slice::new([0..1, 0..8]))];
    let machine = Machine { buffer_len_bytes: 2 << 20, ..Machine::default() };
    insta::assert_snapshot!(Plan::new(&tiny().checkpoint, &request, &machine).unwrap());
}

#[test]
fn a_plan_serializes_for_scripts() {
    let request = Request::of(Select::Globs(vec!["model.norm*".to_owned(), "flags".to_owned()]));
    let plan = Plan::new(&tiny().checkpoint, &request, &Machine::default()).unwrap();
    insta::assert_snapshot!(serde_json::to_string_pretty(&plan).unwrap());
}

#[test]
fn a_request_for_what_is_not_there_says_so() {
    let world = tiny();
    let error = |request: &Request| {
        Plan::new(&world.checkpoint, request, &Machine::default()).unwrap_err().to_string()
    };
    let globs = |glob: &str| Request::of(Select::Globs(vec![glob.to_owned()]));
    assert_eq!(error(&globs("*.bias")), r#"no tensor matches "*.bias" (the checkpoint has 8)"#);
    assert_eq!(error(&globs("[z")), r#""[z" is not a glob: unclosed character class; missing ']'"#);
    let names = Request::of(Select::Names(vec!["nobody".to_owned()]));
    assert_eq!(error(&names), r#"no tensor is named "nobody" (the checkpoint has 8)"#);
    let mut sliced = globs("flags");
    sliced.slices = vec![("scale".to_owned(), Slice::new([]))];
    assert_eq!(error(&sliced), r#"tensor "scale": a slice is asked for, but the tensor is not selected"#);
    sliced.slices = vec![("flags".to_owned(), Slice::rows(0..4))];
    assert_eq!(error(&sliced), r#"tensor "flags" has no such slice"#);
    let mut budget = Request::all();
    budget.target_bytes_max = Some(1000);
    assert!(error(&budget).starts_with("the result takes "), "{}", error(&budget));
}

#[test]
fn globs_cross_dots_and_exact_names_match_themselves() {
    let spec = |name: &str| (name.to_owned(), Dtype::U8, vec![1]);
    let world = world(&[vec![spec("a.b.c"), spec("a[0]"), spec("d")]], 8);
    let selected = |globs: &[&str]| {
        let request = Request::of(Select::Globs(globs.iter().map(|glob| (*glob).to_owned()).collect()));
        let ids = request.tensors(&world.checkpoint).unwrap();
        ids.iter().map(|id| world.checkpoint.tensor(*id).info.name.to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(selected(&["a*c"]), ["a.b.c"]);
    assert_eq!(selected(&["a[0]"]), ["a[0]"]);
    assert_eq!(selected(&["{d,a.*}"]), ["a.b.c", "d"]);
    assert_eq!(selected(&["d", "*"]), ["a.b.c", "a[0]", "d"]);
}
