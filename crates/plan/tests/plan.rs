//! Plans, executed naively over made-up files: every byte lands where it belongs, whatever the order.

#![allow(clippy::unwrap_used, reason = "a failed expectation is the test's own report")]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use tensorhaul_plan::plan::Target;
use tensorhaul_plan::quant::{Codes, Element, Family, Group, Recipe, Role, ZeroPoint};
use tensorhaul_plan::{
    Brought, Dequantize, DeviceId, DeviceMap, Dtype, External, InPlace, Layout, Machine, Place, Plan,
    PlanError, Request, Route, Select, Slice, SliceRange, Stride,
};

use support::{Spec, World, execute, naive, world};

fn check(world: &World, request: &Request, machine: &Machine) {
    let plan = Plan::new(&world.checkpoint, request, machine).unwrap();
    let slices: BTreeMap<_, _> =
        request.slices.iter().map(|(name, slice)| (name.as_str(), slice.ranges())).collect();

    // Reads are aligned, inside their file, no longer than a buffer, in schedule order.
    assert!(plan.reads().is_sorted_by_key(|read| (read.extent.file, read.extent.offset_bytes)));
    for read in plan.reads() {
        let (extent, align) = (read.extent, machine.direct_align_bytes);
        let file_len = world.files[extent.file as usize].len() as u64;
        let route = machine.in_place.route(request.device, extent.file);
        let len_bytes_max = match read.target {
            Target::Staged { .. } => machine.buffer_len_bytes,
            Target::InPlace(_) => {
                route.expect("only what a route allows is read in place").read_len_bytes_max
            }
        };
        assert!(extent.len_bytes > 0 && extent.end_bytes() <= file_len);
        assert!(read.len_bytes() <= len_bytes_max);
        if let Some(stride) = read.stride {
            let Stride { piece_len_bytes, piece_count, stride_bytes } = stride;
            assert_eq!((piece_count - 1) * stride_bytes + piece_len_bytes, extent.len_bytes);
            assert!(stride_bytes > piece_len_bytes);
            continue;
        }
        assert!(extent.offset_bytes.is_multiple_of(align));
        assert!(extent.end_bytes().is_multiple_of(align) || extent.end_bytes() == file_len);
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
        assert_eq!(arena.is_external, request.external.iter().any(|external| external.name == name));
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
        for brought in plan.brought(read) {
            let Brought::Tensor(tensor) = brought else { unreachable!("nothing is dequantized") };
            missing[*tensor as usize] -= u32::from(plan.tensors()[*tensor as usize].len_bytes > 0);
        }
    }
    assert!(missing.iter().all(|missing| *missing == 0));

    // The promise is the sum.
    let promised = plan.promised();
    assert_eq!(promised.payload_bytes, plan.tensors().iter().map(|tensor| tensor.len_bytes).sum::<u64>());
    assert_eq!(promised.payload_bytes, plan.reads().iter().map(|read| read.payload_bytes).sum::<u64>());
    assert_eq!(promised.read_bytes, plan.reads().iter().map(|read| read.len_bytes()).sum::<u64>());
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

/// Which of the files, three at most, can be read in place.
fn in_place() -> impl Strategy<Value = InPlace> {
    let files = proptest::option::of(proptest::collection::vec(any::<bool>(), 3));
    let route = (files, 1u64..40).prop_map(|(files, pages)| Route {
        device: DeviceId::Host,
        files,
        is_hosts: true,
        read_len_bytes_max: pages * 4096,
    });
    proptest::option::of(route).prop_map(|route| InPlace { routes: route.into_iter().collect() })
}

fn machine() -> impl Strategy<Value = Machine> {
    (1u64..40, 1u32..9, 0u32..4, in_place()).prop_map(|(pages, buffer_count, align, in_place)| Machine {
        buffer_len_bytes: pages * 4096,
        buffer_count,
        direct_align_bytes: [1, 512, 4096, 4096][align as usize],
        in_place,
        ..Machine::default()
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
        cuts in proptest::collection::vec((0u64..60, 0u64..60, 1u64..4), 64),
        over_read_max in prop_oneof![Just(1.0), Just(1.02), Just(100.0)],
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
            let ranges: Vec<SliceRange> = shape
                .iter()
                .enumerate()
                .map(|(dim, len)| {
                    let (a, b, step) = cuts[(index * 3 + dim) % cuts.len()];
                    SliceRange { start: a.min(b).min(*len), stop: a.max(b).min(*len), step }
                })
                .collect();
            sliced.slices.push((name.clone(), Slice::with_steps(ranges)));
        }
        check(&world, &sliced, &machine);
        sliced.over_read_max = over_read_max;
        let external = |name: &String| External { name: name.clone(), device: DeviceId::Host, strides: None };
        sliced.external = kept.iter().step_by(3).map(external).collect();
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
    let machine = Machine {
        buffer_len_bytes: 1 << 20,
        buffer_count: 16,
        direct_align_bytes: 512,
        in_place: InPlace::host(1 << 20),
        ..Machine::default()
    };
    insta::assert_snapshot!(Plan::new(&tiny().checkpoint, &Request::all(), &machine).unwrap());
}

#[test]
fn an_accelerator_that_some_files_are_read_into_directly_stages_the_rest() {
    let specs = |prefix: &str| vec![(format!("{prefix}.weight"), Dtype::U8, vec![3, 100_000])];
    let world = world(&[specs("a"), specs("b"), specs("c")], 8);
    let mut request = Request::all();
    request.device = DeviceId::Cuda(1);
    let of_device = |device| Route {
        device,
        files: Some(vec![true, false, true]),
        is_hosts: false,
        read_len_bytes_max: 64 << 10,
    };
    let direct =
        |device| Machine { in_place: InPlace { routes: vec![of_device(device)] }, ..Machine::default() };
    let plan = Plan::new(&world.checkpoint, &request, &direct(DeviceId::Cuda(1))).unwrap();
    check(&world, &request, plan.machine());
    for read in plan.reads() {
        assert_eq!(matches!(read.target, Target::InPlace(_)), read.extent.file != 1);
    }
    // Another device's route says nothing about this one's memory.
    let plan = Plan::new(&world.checkpoint, &request, &direct(DeviceId::Cuda(0))).unwrap();
    assert_eq!(plan.promised().in_place_bytes, 0);
}

#[test]
fn memory_that_an_accelerator_shares_with_the_host_is_planned_and_counted_as_the_hosts() {
    let world = tiny();
    let plan = |device, in_place| {
        let mut request = Request::all();
        request.device = device;
        let machine = Machine { in_place, ..Machine::default() };
        check(&world, &request, &machine);
        Plan::new(&world.checkpoint, &request, &machine).unwrap()
    };
    let (host, shared) = (DeviceId::Host, DeviceId::Rocm(0));
    let on_host = plan(host, InPlace::host(1 << 20));
    let on_shared = plan(shared, InPlace::shared(shared, 1 << 20));
    assert!(on_shared.promised().in_place_bytes > 0);
    assert_eq!(on_shared.promised(), on_host.promised());
    assert_eq!(plan(shared, InPlace::never()).promised().in_place_bytes, 0);
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

/// Groups of neighbouring tensors, whatever they are: planning does not look into recipes.
fn groups_of(world: &World, sizes: &[usize]) -> Arc<[Group]> {
    let mut ids: Vec<_> = world.checkpoint.tensors().filter(|tensor| tensor.info.len_bytes() > 0).collect();
    let mut groups = Vec::new();
    for size in sizes {
        if ids.len() < *size {
            break;
        }
        // Sources of one group lie far apart, as scales do that a writer sorted by dtype.
        let members: Vec<_> = (0..*size).map(|turn| ids.remove((turn * 7) % ids.len())).collect();
        let roles = [Role::Payload, Role::Scale, Role::ZeroPoint, Role::Fold];
        let recipe = Recipe {
            batch: 1,
            rows: 3,
            cols: members[0].info.len_bytes(),
            codes: Codes::Rows { bits: 8, row_stride_bytes: 0 },
            first_row: 0,
            first_col: 0,
            element: Element::Unsigned,
            zero_point: ZeroPoint::None,
            scale: None,
            factor: None,
            bias: None,
            fold: Some(Dtype::Bf16),
            group_index: None,
            is_column_major: true,
        };
        groups.push(Group {
            name: format!("{}.made", members[0].info.name),
            shape: vec![3, recipe.cols],
            family: Family::Gptq,
            bits: 8,
            group_size: None,
            is_plain_transposed: false,
            is_symmetric: None,
            members: roles.into_iter().zip(members.iter().map(|member| member.id)).collect(),
            recipe: recipe.into(),
        });
    }
    groups.sort_by_key(Group::payload);
    groups.into()
}

/// Two lanes that take their reads in order, each when what it waits for has been started, as the pipeline does; operations start
/// when their last source has arrived. Every operation must find its sources whole, and nothing may wait for ever.
fn check_operations(world: &World, plan: &Plan, lane_of: impl Fn(usize) -> usize, turns: &[usize]) {
    let mut arenas: Vec<_> = plan.arenas().iter().map(|arena| vec![0xee; arena.len_bytes as usize]).collect();
    let mut missing: Vec<u32> = plan.operations().iter().map(|operation| operation.read_count).collect();
    let mut is_started = vec![false; plan.operations().len()];
    let mut lanes: [Vec<usize>; 2] = Default::default();
    (0..plan.reads().len()).rev().for_each(|read| lanes[lane_of(read) % 2].push(read));
    let start = |number: u32, arenas: &[Vec<u8>], is_started: &mut [bool]| {
        is_started[number as usize] = true;
        for source in &plan.operations()[number as usize].sources {
            let stored = world.checkpoint.tensor(source.id);
            let file = &world.files[stored.file as usize];
            let expected = &file[stored.file_offset_bytes as usize..][..source.len_bytes as usize];
            let found = &arenas[source.place.arena as usize][source.place.offset_bytes as usize..];
            assert!(found.starts_with(expected), "a source of {number} was overwritten");
        }
    };
    for operation in 0..missing.len() as u32 {
        if missing[operation as usize] == 0 {
            start(operation, &arenas, &mut is_started);
        }
    }
    for turn in 0.. {
        let prefix = is_started.iter().take_while(|started| **started).count() as u32;
        let may = |lane: &Vec<usize>| lane.last().is_some_and(|read| plan.reads()[*read].after.end <= prefix);
        let wish = turns[turn % turns.len()] % 2;
        let Some(lane) = [wish, 1 - wish].into_iter().find(|lane| may(&lanes[*lane])) else { break };
        let read = lanes[lane].pop().unwrap();
        let done = execute(world, plan, std::iter::once(read));
        let read = &plan.reads()[read];
        let spans: Vec<_> = match &read.target {
            Target::InPlace(place) => vec![(*place, read.len_bytes())],
            Target::Staged { .. } => {
                let pieces = plan.copies(read).iter().flat_map(|copy| {
                    let place = |(_, offset_bytes)| (Place { offset_bytes, ..copy.target }, copy.len_bytes);
                    copy.pieces().map(place)
                });
                pieces.collect()
            }
        };
        for (place, len) in spans {
            let range = place.offset_bytes as usize..(place.offset_bytes + len) as usize;
            arenas[place.arena as usize][range.clone()].copy_from_slice(&done[place.arena as usize][range]);
        }
        for brought in plan.brought(read) {
            let Brought::Operation(operation) = brought else { continue };
            missing[*operation as usize] -= 1;
            if missing[*operation as usize] == 0 {
                start(*operation, &arenas, &mut is_started);
            }
        }
    }
    assert!(lanes.iter().all(Vec::is_empty), "a read waits for ever");
    assert!(is_started.iter().all(|started| *started));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn sources_are_whole_when_their_operation_starts_whatever_the_order(
        files in files(),
        sizes in proptest::collection::vec(1usize..5, 0..9),
        lanes in proptest::collection::vec(0usize..2, 1..9),
        turns in proptest::collection::vec(0usize..2, 1..9),
        budget in 0u64..3,
        in_place in in_place(),
        fold in any::<bool>(),
    ) {
        let world = world(&files, 64);
        let groups = groups_of(&world, &sizes);
        let machine = Machine { buffer_len_bytes: 65536, buffer_count: 3, in_place, ..Machine::default() };
        let (dtype, layout) = (Dtype::Bf16, Layout::AsStored);
        let mut request = Request::all();
        request.dequantize = Some(Dequantize { groups: groups.clone(), globs: None, dtype, layout, fold });
        let roomy = Plan::new(&world.checkpoint, &request, &machine).unwrap();
        check_operations(&world, &roomy, |read| lanes[read % lanes.len()], &turns);

        // The least budget that is not refused, or a little more: places are taken again.
        request.transient_bytes_max = Some(0);
        if let Err(PlanError::OverTransientBudget { needed_bytes, .. }) = Plan::new(&world.checkpoint, &request, &machine) {
            let max_bytes = needed_bytes * (budget + 2) / 2;
            request.transient_bytes_max = Some(max_bytes);
            let tight = Plan::new(&world.checkpoint, &request, &machine).unwrap();
            prop_assert!(tight.promised().transient_bytes <= max_bytes);
            check_operations(&world, &tight, |read| lanes[read % lanes.len()], &turns);
        }
        prop_assert_eq!(roomy.operations().len(), groups.len());
        for operation in roomy.operations() {
            prop_assert_eq!(operation.recipe.fold.is_some(), fold);
            prop_assert_eq!(operation.shape[1], 3);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn what_several_devices_make_numbers_of_is_read_once(
        files in files(),
        sizes in proptest::collection::vec(1usize..5, 1..9),
        lanes in proptest::collection::vec(0usize..2, 1..9),
        turns in proptest::collection::vec(0usize..2, 1..9),
        in_place in any::<bool>(),
    ) {
        let world = world(&files, 64);
        let groups = groups_of(&world, &sizes);
        let devices: Vec<_> = (0..3).map(DeviceId::Cuda).collect();
        let routes = devices.iter().flat_map(|device| InPlace::shared(*device, 65536).routes).collect();
        let in_place = if in_place { InPlace { routes } } else { InPlace::never() };
        let machine = Machine { buffer_len_bytes: 65536, direct_align_bytes: 1, in_place, ..Machine::default() };
        let mut request = Request::all();
        let (dtype, layout) = (Dtype::Bf16, Layout::Rows);
        request.dequantize = Some(Dequantize { groups, globs: None, dtype, layout, fold: true });
        request.over_read_max = 1.0;
        let reads = |request: &Request| {
            let plan = Plan::new(&world.checkpoint, request, &machine).unwrap();
            check_operations(&world, &plan, |read| lanes[read % lanes.len()], &turns);
            plan.promised().read_bytes
        };
        let one = reads(&request);
        request.device_map = Some(Arc::new(DeviceMap::new([(String::new(), devices)]).unwrap()));
        prop_assert_eq!(reads(&request), one, "replicated tensors add no reads");
    }
}

#[test]
fn a_plan_with_operations_reads_as_text() {
    let spec = |name: &str, dtype, shape: &[u64]| (name.to_owned(), dtype, shape.to_vec());
    let world = world(
        &[vec![
            spec("layers.0.a.qweight", Dtype::I32, &[64, 256]),
            spec("layers.0.b.qweight", Dtype::I32, &[64, 256]),
            spec("layers.0.c.qweight", Dtype::I32, &[64, 256]),
            spec("layers.0.a.scales", Dtype::F16, &[4, 256]),
            spec("layers.0.b.scales", Dtype::F16, &[16, 256]),
            spec("layers.0.c.scales", Dtype::F16, &[1, 2]),
            spec("norm", Dtype::Bf16, &[96]),
        ]],
        64,
    );
    let group = |module: &str| {
        let id = |leaf: &str| world.checkpoint.find(&format!("layers.0.{module}.{leaf}")).unwrap().id;
        let recipe = Recipe {
            batch: 1,
            rows: 256,
            cols: 512,
            codes: Codes::Columns { bits: 4 },
            first_row: 0,
            first_col: 0,
            element: Element::Unsigned,
            zero_point: ZeroPoint::Constant(8),
            scale: None,
            factor: None,
            bias: None,
            fold: None,
            group_index: None,
            is_column_major: true,
        };
        Group {
            name: format!("layers.0.{module}.weight"),
            shape: vec![256, 512],
            family: Family::Gptq,
            bits: 4,
            group_size: Some(128),
            is_plain_transposed: false,
            is_symmetric: Some(true),
            members: vec![(Role::Payload, id("qweight")), (Role::Scale, id("scales"))],
            recipe: recipe.into(),
        }
    };
    let groups: Arc<[Group]> = ["a", "b", "c"].map(group).into();
    let mut request = Request::all();
    request.device = DeviceId::Cuda(0);
    request.transient_bytes_max = Some(160 << 10);
    request.dequantize =
        Some(Dequantize { groups, globs: None, dtype: Dtype::Bf16, layout: Layout::Rows, fold: false });
    let machine = Machine { buffer_len_bytes: 65536, buffer_count: 4, ..Machine::default() };
    let plan = Plan::new(&world.checkpoint, &request, &machine).unwrap();
    insta::assert_snapshot!(plan);

    // A result is selected by its own name; what it uses up, and slices of it, are told apart.
    request.select = Select::Names(vec!["layers.0.b.weight".to_owned(), "layers.0.a.scales".to_owned()]);
    let some = Plan::new(&world.checkpoint, &request, &machine).unwrap();
    let names: Vec<_> = some.tensors().iter().map(|tensor| some.name(tensor)).collect();
    assert_eq!(names, ["layers.0.b.weight", "layers.0.a.scales"]);
    let steps = SliceRange { start: 0, stop: 4, step: 2 };
    request.slices = vec![("layers.0.b.weight".to_owned(), Slice::with_steps([steps]))];
    let sliced = Plan::new(&world.checkpoint, &request, &machine).unwrap_err();
    assert!(matches!(sliced, PlanError::SliceOfMade { .. }), "{sliced}");
}
