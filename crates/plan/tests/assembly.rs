//! Results put together from parts, on one device or several: every byte lands where it belongs, and is read once.

#![allow(clippy::unwrap_used, reason = "a failed expectation is the test's own report")]

mod support;

use std::sync::Arc;

use proptest::prelude::*;
use tensorhaul_plan::assembly::{Assembled, Assembly, Part, Source};
use tensorhaul_plan::{
    Brought, DeviceId, DeviceMap, Dims, Dtype, Extent, External, InPlace, Machine, OverReadReason, Plan,
    PlanError, Request, Select, Slice, SliceRange, Target,
};

use support::{Spec, World, execute, naive, world};

/// The bytes of an assembled tensor, element by element.
fn put_together(world: &World, tensor: &Assembled, width: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; tensor.shape.iter().product::<u64>() as usize * width];
    for part in &tensor.parts {
        let Source::Stored(id) = part.source else { unreachable!("nothing is dequantized") };
        let info = world.checkpoint.tensor(id).info;
        let kept = part.slice.shape(info.shape).unwrap();
        let elements = naive(world, info.name, Some(part.slice.ranges()));
        let outer = tensor.shape.len() - kept.len();
        for (flat, element) in elements.chunks(width).enumerate() {
            let mut rest = flat as u64;
            let mut index = part.at.clone();
            for dim in (0..kept.len()).rev() {
                index[outer + dim] += rest % kept[dim];
                rest /= kept[dim];
            }
            let place = index.iter().zip(&tensor.shape).fold(0, |place, (at, len)| place * len + at);
            bytes[place as usize * width..][..width].copy_from_slice(element);
        }
    }
    bytes
}

fn check(world: &World, request: &Request, machine: &Machine, expected: impl Fn(&str, DeviceId) -> Vec<u8>) {
    let plan = Plan::new(&world.checkpoint, request, machine).unwrap();
    let forward = execute(world, &plan, 0..plan.reads().len());
    let backward = execute(world, &plan, (0..plan.reads().len()).rev());
    let mut missing: Vec<u32> = plan.tensors().iter().map(|tensor| tensor.read_count).collect();
    for brought in plan.reads().iter().flat_map(|read| plan.brought(read)) {
        let Brought::Tensor(tensor) = brought else { unreachable!("nothing is dequantized") };
        missing[*tensor as usize] -= 1;
    }
    assert!(missing.iter().all(|missing| *missing == 0));
    let by_device = |tensor| plan.device(tensor);
    assert!(plan.tensors().is_sorted_by_key(by_device));
    for tensor in plan.tensors() {
        let (name, device) = (plan.name(tensor), plan.device(tensor));
        let expected = expected(name, device);
        assert_eq!(tensor.len_bytes, expected.len() as u64, "{name}");
        if let Some(source) = tensor.copy_of {
            let source = &plan.tensors()[source as usize];
            assert_eq!((plan.name(source), tensor.read_count), (name, 0));
            assert!(machine.peers.contains(&(plan.device(source), device)));
            assert_eq!((source.len_bytes, source.copy_of), (tensor.len_bytes, None));
            continue;
        }
        for arenas in [&forward, &backward] {
            let arena = &arenas[tensor.place.arena as usize];
            let found = &arena[tensor.place.offset_bytes as usize..][..expected.len()];
            assert!(found == expected, "{name} on {device} is not what the file holds");
        }
    }
    for read in plan.reads() {
        let file_len = world.files[read.extent.file as usize].len() as u64;
        assert!(read.extent.end_bytes() <= file_len && read.payload_bytes > 0);
        assert!(read.payload_bytes <= read.len_bytes());
        if let Target::Staged { .. } = read.target {
            assert!(read.len_bytes() <= machine.buffer_len_bytes);
        }
    }
}

/// Cuts a tensor's rows or columns at random places and gives the slices to devices.
fn slices(shape: &[u64], dim: usize, cuts: &[u64]) -> Vec<(Vec<SliceRange>, Vec<u64>)> {
    let mut ends: Vec<u64> = cuts.iter().map(|cut| cut % (shape[dim] + 1)).collect();
    ends.extend([0, shape[dim]]);
    ends.sort_unstable();
    let slice = |pair: &[u64]| {
        let whole = |len: &u64| SliceRange::from(0..*len);
        let mut ranges: Vec<SliceRange> = shape.iter().map(whole).collect();
        ranges[dim] = SliceRange::from(pair[0]..pair[1]);
        let kept = ranges.iter().map(SliceRange::len).collect();
        (ranges, kept)
    };
    ends.windows(2).map(slice).collect()
}

fn shapes() -> impl Strategy<Value = Vec<(u64, u64)>> {
    proptest::collection::vec((1u64..40, prop_oneof![1u64..40, 1000u64..2000]), 1..6)
}

fn machine() -> impl Strategy<Value = Machine> {
    (1u64..20, 1u32..9, any::<bool>()).prop_map(|(pages, buffer_count, in_place)| Machine {
        buffer_len_bytes: pages * 4096,
        buffer_count,
        in_place: if in_place { InPlace::host(8192) } else { InPlace::never() },
        ..Machine::default()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn slices_of_all_ranks_in_one_plan_land_on_their_devices(
        shapes in shapes(),
        dim in 0usize..2,
        cuts in proptest::collection::vec(any::<u64>(), 0..4),
        machine in machine(),
        over_read_max in prop_oneof![Just(1.0), Just(1.02), Just(100.0)],
    ) {
        let spec = |(index, (rows, cols)): (usize, &(u64, u64))| -> Spec {
            (format!("model.layers.{index}.w"), Dtype::U16, vec![*rows, *cols])
        };
        let world = world(&[shapes.iter().enumerate().map(spec).collect()], 8);
        let mut tensors = Vec::new();
        for stored in world.checkpoint.tensors() {
            for (rank, (ranges, kept)) in slices(stored.info.shape, dim, &cuts).into_iter().enumerate() {
                let device = [DeviceId::Host, DeviceId::Cuda(0), DeviceId::Cuda(1)][rank % 3];
                let part = Part {
                    source: Source::Stored(stored.id),
                    slice: Slice::with_steps(ranges),
                    at: Dims::from_elem(0, 2),
                };
                let name = format!("{}.{rank}", stored.info.name);
                tensors.push(Assembled { name, shape: kept.into(), device, parts: [part].into() });
            }
        }
        let expected: Vec<_> = tensors.iter().map(|tensor| put_together(&world, tensor, 2)).collect();
        let mut request = Request::all();
        request.assembly = Some(Arc::new(Assembly { tensors: tensors.clone(), ..Assembly::default() }));
        request.over_read_max = over_read_max;
        let promised = *Plan::new(&world.checkpoint, &request, &machine).unwrap().promised();
        prop_assert_eq!(promised.needed_bytes, promised.payload_bytes, "slices share no byte");
        check(&world, &request, &machine, |name, _| {
            expected[tensors.iter().position(|tensor| tensor.name == name).unwrap()].clone()
        });
    }

    #[test]
    fn fused_and_stacked_tensors_are_put_together_where_they_end_up(
        lens in proptest::collection::vec(1u64..60, 2..5),
        cols in 1u64..300,
        stack in any::<bool>(),
        shuffle in any::<bool>(),
        cut in (0u64..300, 0u64..300),
        machine in machine(),
        strided in any::<bool>(),
    ) {
        let rows = |len: u64| if stack { lens[0] } else { len };
        let mut specs: Vec<Spec> =
            lens.iter().enumerate().map(|(index, len)| (format!("w{index}"), Dtype::F32, vec![rows(*len), cols])).collect();
        if shuffle {
            specs.reverse();
        }
        let files = if shuffle { specs.chunks(1).map(<[Spec]>::to_vec).collect() } else { vec![specs] };
        let world = world(&files, 8);
        let kept = cut.0.min(cut.1).min(cols - 1)..(cut.0.max(cut.1) + 1).min(cols);
        let width = kept.end - kept.start;
        let (mut parts, mut at) = (Vec::new(), 0);
        for (index, len) in lens.iter().enumerate() {
            let stored = world.checkpoint.find(&format!("w{index}")).unwrap();
            let slice = Slice::new(vec![0..rows(*len), kept.clone()]);
            let at_index = if stack { vec![index as u64, 0, 0] } else { vec![at, 0] };
            parts.push(Part { source: Source::Stored(stored.id), slice, at: at_index.into() });
            at += rows(*len);
        }
        let shape = if stack { vec![lens.len() as u64, lens[0], width] } else { vec![at, width] };
        let name = "fused".to_owned();
        let fused = Assembled {
            name: name.clone(),
            shape: shape.clone().into(),
            device: DeviceId::Host,
            parts: parts.into(),
        };
        let dense = put_together(&world, &fused, 4);
        let mut request = Request::all();
        request.assembly = Some(Arc::new(Assembly { tensors: vec![fused], ..Assembly::default() }));
        if !strided {
            check(&world, &request, &machine, |_, _| dense.clone());
            return Ok(());
        }
        // The caller's rows are 3 elements apart from each other.
        let pitch = width + 3;
        let strides = if stack { vec![lens[0] * pitch, pitch, 1] } else { vec![pitch, 1] };
        request.external = vec![External { name, device: DeviceId::Host, strides: Some(strides) }];
        let plan = Plan::new(&world.checkpoint, &request, &machine).unwrap();
        let arenas = execute(&world, &plan, 0..plan.reads().len());
        let row_count = shape[..shape.len() - 1].iter().product::<u64>();
        prop_assert_eq!(plan.arenas()[0].len_bytes, ((row_count - 1) * pitch + width) * 4);
        for (row, expected) in dense.chunks(width as usize * 4).enumerate() {
            let begin = row * pitch as usize * 4;
            prop_assert_eq!(&arenas[0][begin..begin + expected.len()], expected);
            let gap = &arenas[0][begin + expected.len()..];
            prop_assert!(gap.iter().take(12).all(|byte| *byte == 0xee), "the caller's gaps are left alone");
        }
    }

    #[test]
    fn mapped_tensors_are_read_once_and_land_on_every_device_they_are_for(
        shapes in shapes(),
        places in proptest::collection::vec(1usize..8, 1..6),
        peers in any::<bool>(),
        machine in machine(),
    ) {
        let spec = |(index, (rows, cols)): (usize, &(u64, u64))| -> Spec {
            (format!("model.layers.{index}.w"), Dtype::U16, vec![*rows, *cols])
        };
        let world = world(&[shapes.iter().enumerate().map(spec).collect()], 8);
        let devices = [DeviceId::Host, DeviceId::Cuda(0), DeviceId::Cuda(1)];
        let of = |index: usize| -> Vec<DeviceId> {
            let mask = places[index % places.len()];
            (0..3).filter(|bit| mask >> bit & 1 == 1).map(|bit| devices[bit]).collect()
        };
        let entries: Vec<_> = (0..shapes.len()).map(|index| (format!("model.layers.{index}"), of(index))).collect();
        let mut request = Request::all();
        request.device_map = Some(Arc::new(DeviceMap::new(entries).unwrap()));
        let mut machine = machine;
        if peers {
            machine.peers = vec![(DeviceId::Cuda(0), DeviceId::Cuda(1)), (DeviceId::Cuda(1), DeviceId::Cuda(0))];
        }
        check(&world, &request, &machine, |name, _| naive(&world, name, None));
        let plan = Plan::new(&world.checkpoint, &request, &machine).unwrap();
        let mut extents: Vec<Extent> = plan.reads().iter().map(|read| read.extent).collect();
        extents.sort_unstable();
        // Only whole blocks at the ends of neighbouring reads are read twice.
        let twice = extents.windows(2).map(|pair| pair[0].end_bytes().saturating_sub(pair[1].offset_bytes));
        prop_assert!(twice.max().unwrap_or(0) < 4096 + 1, "{extents:?}");
        let total: usize = (0..shapes.len()).map(|index| of(index).len()).sum();
        prop_assert_eq!(plan.tensors().len(), total);
    }
}

#[test]
fn narrow_columns_are_read_piece_by_piece_unless_more_may_be_read() {
    let world = world(&[vec![("w".to_owned(), Dtype::Bf16, vec![1024, 14336])]], 8);
    let plan = |over_read_max| {
        let mut request = Request::all();
        request.slices = vec![("w".to_owned(), Slice::new([0..1024, 0..1792]))];
        request.over_read_max = over_read_max;
        Plan::new(&world.checkpoint, &request, &Machine::default()).unwrap()
    };
    let exact = plan(1.02);
    assert_eq!(exact.promised().read_bytes, 1024 * 3584, "no byte more");
    assert_eq!((exact.promised().reads, exact.promised().copies), (1, 1));
    assert!(exact.over_reads().is_empty());
    // Gaps of 25 KiB cost more than a request each, so nothing changes; those of 3584 bytes cost less.
    assert_eq!(plan(100.0).promised().read_bytes, 1024 * 3584);
    let halves = |over_read_max| {
        let mut request = Request::all();
        request.slices = vec![("w".to_owned(), Slice::new([0..1024, 0..12544]))];
        request.over_read_max = over_read_max;
        Plan::new(&world.checkpoint, &request, &Machine::default()).unwrap()
    };
    assert_eq!(halves(1.02).promised().read_bytes, 1024 * 25088);
    assert!(halves(1.5).promised().read_bytes > 1023 * 28672);
}

#[test]
fn pieces_too_short_to_be_read_apart_are_told() {
    let world = world(&[vec![("w".to_owned(), Dtype::F32, vec![4096, 64])]], 8);
    let mut request = Request::all();
    request.slices = vec![("w".to_owned(), Slice::new([0..4096, 0..8]))];
    let plan = Plan::new(&world.checkpoint, &request, &Machine::default()).unwrap();
    let [over] = plan.over_reads() else { panic!("{:?}", plan.over_reads()) };
    assert_eq!((over.name.as_str(), over.reason), ("w", OverReadReason::ShortPieces { piece_len_bytes: 32 }));
    assert_eq!(over.over_bytes, 4095 * 256 + 32 - 4096 * 32);
}

/// A checkpoint of long tensors with others between them, so many bytes each; and the names of the long ones.
fn long_and_short(gap_len_bytes: &[u64]) -> (World, Vec<String>) {
    let mut specs = vec![("a.long".to_owned(), Dtype::U8, vec![1 << 20])];
    for (number, len_bytes) in gap_len_bytes.iter().enumerate() {
        specs.push((format!("b.gap.{number}"), Dtype::U8, vec![*len_bytes]));
        specs.push((format!("c.long.{number}"), Dtype::U8, vec![100 << 10]));
    }
    let kept = specs.iter().map(|(name, ..)| name.clone()).filter(|name| name.contains("long"));
    let kept = kept.collect();
    (world(&[specs], 8), kept)
}

#[test]
fn gaps_between_neighbours_are_read_along_within_the_bound_the_narrowest_first() {
    let gaps = [30 << 10, 10 << 10, 20 << 10, 5 << 10];
    let (world, kept) = long_and_short(&gaps);
    let plan = |over_read_max, direct_align_bytes| {
        let mut request = Request::of(Select::Names(kept.clone()));
        request.device = DeviceId::Cuda(0);
        request.over_read_max = over_read_max;
        let machine = Machine { direct_align_bytes, ..Machine::default() };
        let plan = Plan::new(&world.checkpoint, &request, &machine).unwrap();
        let promised = *plan.promised();
        let allowed_bytes = (promised.needed_bytes as f64 * over_read_max) as u64;
        assert!(promised.read_bytes <= allowed_bytes, "{promised:?}");
        assert_eq!(plan.over_reads(), []);
        (promised.reads, promised.read_bytes - promised.needed_bytes)
    };
    // 1.4 MiB are needed.
    assert_eq!(plan(1.0, 1), (5, 0), "nothing is read in vain, not a byte");
    assert_eq!(plan(1.005, 1), (4, 5 << 10));
    assert_eq!(plan(1.02, 1), (3, 15 << 10));
    assert_eq!(plan(1.03, 1), (2, 35 << 10));
    assert_eq!(plan(1.5, 1), (1, 65 << 10));
    // Whole blocks are paid for first, and what lies between the same two is read along for nothing.
    let (reads, over_bytes) = plan(1.02, 4096);
    assert!(reads == 3 && over_bytes > 15 << 10, "{reads} {over_bytes}");
}

#[test]
fn blocks_of_direct_reads_are_told_where_they_pass_the_bound() {
    let names = |kind: &str| (0..100).map(|n| format!("{n:03}.{kind}")).collect::<Vec<_>>();
    let specs = names("small").into_iter().zip(names("large"));
    let specs =
        specs.flat_map(|(small, large)| [(small, Dtype::U8, vec![100]), (large, Dtype::U8, vec![1_000_000])]);
    let world = world(&[specs.collect()], 8);
    let plan = |direct_align_bytes| {
        let request = Request::of(Select::Names(names("small")));
        let machine = Machine { direct_align_bytes, ..Machine::default() };
        Plan::new(&world.checkpoint, &request, &machine).unwrap()
    };
    assert_eq!((plan(1).promised().read_bytes, plan(1).over_reads()), (10_000, &[][..]));
    let plan = plan(4096);
    let promised = plan.promised();
    assert_eq!(promised.alignment_bytes, promised.read_bytes - promised.needed_bytes);
    let told: u64 = plan.over_reads().iter().map(|over| over.over_bytes).sum();
    assert!(told >= promised.read_bytes - promised.needed_bytes * 102 / 100, "{told} {promised:?}");
    let reason = OverReadReason::Alignment { align_bytes: 4096 };
    assert!(plan.over_reads().iter().all(|over| over.reason == reason && over.name.ends_with("small")));
    assert!(plan.to_string().contains("3996 bytes: direct reads are whole blocks of 4096 bytes\n"), "{plan}");
}

#[test]
fn a_bound_below_what_is_needed_is_refused() {
    let world = world(&[vec![("w".to_owned(), Dtype::F32, vec![4])]], 8);
    for (bound, text) in [(0.5, "0.5"), (f64::NAN, "NaN"), (f64::INFINITY, "inf")] {
        let mut request = Request::all();
        request.over_read_max = bound;
        let error = Plan::new(&world.checkpoint, &request, &Machine::default()).unwrap_err();
        let expected =
            format!("reading at most {text} times what is needed cannot be kept; give a number from 1 on");
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn what_cannot_be_put_together_says_why() {
    let spec = |name: &str, dtype, shape: &[u64]| (name.to_owned(), dtype, shape.to_vec());
    let world = world(&[vec![spec("a", Dtype::F32, &[4, 8]), spec("b", Dtype::F16, &[4, 8])]], 8);
    let part = |name: &str, at: &[u64]| Part {
        source: Source::Stored(world.checkpoint.find(name).unwrap().id),
        slice: Slice::whole(),
        at: at.into(),
    };
    let error = |shape: &[u64], parts: Vec<Part>| {
        let tensor =
            Assembled { name: "x".into(), shape: shape.into(), device: DeviceId::Host, parts: parts.into() };
        let mut request = Request::all();
        request.assembly = Some(Arc::new(Assembly { tensors: vec![tensor], ..Assembly::default() }));
        Plan::new(&world.checkpoint, &request, &Machine::default()).unwrap_err().to_string()
    };
    assert_eq!(error(&[4, 8], vec![]), r#"tensor "x" is to be put together from nothing"#);
    assert_eq!(
        error(&[8, 8], vec![part("a", &[0, 0]), part("b", &[4, 0])]),
        r#"tensor "x" cannot be put together from parts of F32 and F16"#
    );
    assert_eq!(
        error(&[4, 8], vec![part("a", &[1, 0])]),
        r#"tensor "x": a part of shape [4, 8] at [1, 0] leaves its shape [4, 8]"#
    );
    assert_eq!(error(&[8, 8], vec![part("a", &[0, 0])]), r#"tensor "x" has 64 elements, its parts have 32"#);
    let mut request = Request::all();
    request.device_map = Some(Arc::new(DeviceMap::new([("a".to_owned(), vec![DeviceId::Cuda(0)])]).unwrap()));
    let error = Plan::new(&world.checkpoint, &request, &Machine::default()).unwrap_err();
    assert_eq!(error.to_string(), "no entry of the device map is about 1 tensor: b");
    let strides = |strides: &[u64]| {
        let mut request = Request::all();
        request.external =
            vec![External { name: "a".into(), device: DeviceId::Host, strides: Some(strides.to_vec()) }];
        Plan::new(&world.checkpoint, &request, &Machine::default())
    };
    assert!(matches!(strides(&[7, 1]), Err(PlanError::BadStrides { .. })));
    assert!(matches!(strides(&[8]), Err(PlanError::BadStrides { .. })));
    assert!(strides(&[1, 4]).is_ok(), "column-major memory is as good");
}
