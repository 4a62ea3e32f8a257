//! Ranks of a node that share their reading: every byte lands, each is read once, and both sides of a message agree.

#![allow(clippy::unwrap_used, reason = "a failed expectation is the test's own report")]

#[allow(dead_code, reason = "other tests use the rest")]
mod support;

use std::collections::BTreeMap;

use proptest::prelude::*;
use tensorhaul_plan::assembly::{Assembled, Assembly, Part, Source};
use tensorhaul_plan::share::{Landing, Share, ShareError, Turn};
use tensorhaul_plan::{
    Copy, DeviceId, Dims, Dtype, Machine, Plan, PlanError, Read, Request, Select, Slice, SliceRange,
};

use support::{Spec, World, naive, world};

/// What a tensor is to the ranks.
#[derive(Clone, Copy, Debug)]
enum Rule {
    Replicated,
    /// Cut along this dimension, as evenly as it goes.
    Cut(usize),
    /// On one rank only.
    On(usize),
    /// Cut along rows for half as many parts as there are ranks: neighbours have the same.
    Pairs,
}

/// A rank's parts, by name, with the ranges kept of each.
type Kept = Vec<(String, Vec<SliceRange>)>;

fn kept(world: &World, rules: &[Rule], rank: usize, size: usize) -> Kept {
    let ranges = |shape: &[u64], dim: usize, part: u64, parts: u64| {
        let mut ranges: Vec<SliceRange> = shape.iter().map(|len| SliceRange::from(0..*len)).collect();
        let len = shape[dim];
        ranges[dim] = SliceRange::from(part * len / parts..(part + 1) * len / parts);
        ranges
    };
    let mut kept = Vec::new();
    for (tensor, rule) in world.checkpoint.tensors().zip(rules) {
        let (shape, size) = (tensor.info.shape, size as u64);
        let part = match *rule {
            Rule::Replicated => ranges(shape, 0, 0, 1),
            Rule::Cut(dim) => ranges(shape, dim, rank as u64, size),
            Rule::On(owner) if owner % size as usize == rank => ranges(shape, 0, 0, 1),
            Rule::On(_) => continue,
            Rule::Pairs => ranges(shape, 0, rank as u64 / 2, size.div_ceil(2)),
        };
        kept.push((tensor.info.name.to_owned(), part));
    }
    kept
}

fn assembly(world: &World, kept: &Kept) -> Assembly {
    let one = |(name, ranges): &(String, Vec<SliceRange>)| {
        let shape: Dims = ranges.iter().map(SliceRange::len).collect();
        let part = Part {
            source: Source::Stored(world.checkpoint.find(name).unwrap().id),
            slice: Slice::with_steps(ranges.clone()),
            at: Dims::from_elem(0, shape.len()),
        };
        let parts = (!shape.contains(&0)).then_some(part).into_iter().collect();
        Assembled { name: name.clone(), shape, device: DeviceId::Host, parts }
    };
    // An empty tensor needs a part that tells its dtype, so those are left out.
    let tensors = kept.iter().map(one).filter(|tensor| !tensor.parts.is_empty()).collect();
    Assembly { tensors, ..Assembly::default() }
}

/// Ranks that do what a share says, round by round, and nothing else.
struct Node<'w> {
    world: &'w World,
    share: &'w Share,
    arenas: Vec<Vec<u8>>,
}

impl Node<'_> {
    fn run(world: &World, share: &Share) -> Vec<Vec<u8>> {
        let arenas = share.plan().arenas().iter().map(|arena| vec![0xee; arena.len_bytes as usize]);
        let mut node = Node { world, share, arenas: arenas.collect() };
        (0..share.round_count()).for_each(|round| node.round(share.round(round)));
        node.arenas
    }

    fn round(&mut self, turns: &[Turn]) {
        // Messages under way, by sender and receiver, in the order of their sending.
        let mut under_way: BTreeMap<(u32, u32), Vec<Vec<u8>>> = BTreeMap::new();
        for (rank, turn) in (0..).zip(turns) {
            let bytes: BTreeMap<u32, Vec<u8>> = turn
                .reads
                .clone()
                .map(|read| (read, self.read(&self.share.plan().reads()[read as usize])))
                .collect();
            for read in turn.reads.clone() {
                let own: Vec<Copy> = self.share.own_copies(rank, read).copied().collect();
                own.iter().for_each(|copy| self.copy(&bytes[&read], copy));
            }
            let mut buffer = vec![0xdd; self.share.promised(rank).send_buffer_bytes as usize];
            let mut end = 0;
            for packed in &turn.packed {
                assert_eq!(packed.offset_bytes, end, "packed without gaps");
                for piece in 0..packed.piece_count {
                    let from = (packed.source_offset_bytes + piece * packed.source_stride_bytes) as usize;
                    let len = packed.piece_len_bytes as usize;
                    buffer[end as usize..][..len].copy_from_slice(&bytes[&packed.read][from..][..len]);
                    end += packed.piece_len_bytes;
                }
            }
            for send in &turn.sends {
                assert!(send.offset_bytes + send.len_bytes <= end && send.len_bytes > 0);
                let message = buffer[send.offset_bytes as usize..][..send.len_bytes as usize].to_vec();
                under_way.entry((rank, send.peer)).or_default().push(message);
            }
        }
        for (rank, turn) in (0..).zip(turns) {
            let mut buffer = vec![0xcc; self.share.promised(rank).receive_buffer_bytes as usize];
            for receive in &turn.receives {
                let message = under_way.get_mut(&(receive.peer, rank)).unwrap().remove(0);
                assert_eq!(message.len() as u64, receive.len_bytes, "both sides agree");
                let target = match receive.landing {
                    Landing::InPlace(place) => {
                        &mut self.arenas[place.arena as usize][place.offset_bytes as usize..]
                    }
                    Landing::Buffered(offset_bytes) => &mut buffer[offset_bytes as usize..],
                };
                target[..message.len()].copy_from_slice(&message);
            }
            turn.unpacked.iter().for_each(|copy| self.copy(&buffer, copy));
        }
        assert!(under_way.values().all(Vec::is_empty), "every message is received in its round");
    }

    fn read(&self, read: &Read) -> Vec<u8> {
        let file = &self.world.files[read.extent.file as usize];
        let bytes = &file[read.extent.offset_bytes as usize..read.extent.end_bytes() as usize];
        match read.stride {
            None => bytes.to_vec(),
            Some(stride) => {
                let pieces = bytes.chunks(stride.stride_bytes as usize);
                pieces.flat_map(|chunk| &chunk[..stride.piece_len_bytes as usize]).copied().collect()
            }
        }
    }

    fn copy(&mut self, source: &[u8], copy: &Copy) {
        let target = &mut self.arenas[copy.target.arena as usize];
        for (from, to) in copy.pieces() {
            let piece = &source[from as usize..][..copy.len_bytes as usize];
            target[to as usize..][..piece.len()].copy_from_slice(piece);
        }
    }
}

fn check(world: &World, rules: &[Rule], size: usize, machine: &Machine, over_read_max: f64) -> Share {
    let kept: Vec<Kept> = (0..size).map(|rank| kept(world, rules, rank, size)).collect();
    let assemblies: Vec<_> = kept.iter().map(|kept| assembly(world, kept)).collect();
    let mut request = Request::all();
    request.over_read_max = over_read_max;
    let share = Share::new(&world.checkpoint, &assemblies, &request, machine).unwrap();
    let arenas = Node::run(world, &share);
    for (rank, (kept, assembly)) in kept.iter().zip(&assemblies).enumerate() {
        let tensors: BTreeMap<_, _> = share.tensors(rank as u32).collect();
        assert_eq!(tensors.len(), assembly.tensors.len());
        for Assembled { name, .. } in &assembly.tensors {
            let (_, ranges) = kept.iter().find(|(kept, _)| kept == name).unwrap();
            let (expected, tensor) = (naive(world, name, Some(ranges)), tensors[name.as_str()]);
            let found = &arenas[tensor.place.arena as usize][tensor.place.offset_bytes as usize..];
            assert!(found[..expected.len()] == expected, "{name} on rank {rank} is not what the file holds");
        }
    }
    check_reads(&share);
    share
}

/// Every read is one rank's, each rank reads forwards, rounds fit into a buffer, and nobody reads much more than others.
fn check_reads(share: &Share) {
    let (plan, size): (&Plan, _) = (share.plan(), share.size());
    let mut all: Vec<u32> = Vec::new();
    for rank in 0..size {
        assert!(share.reads(rank).is_sorted(), "forwards");
        all.extend(share.reads(rank));
        let mean = plan.promised().read_bytes / u64::from(size);
        let read_bytes = share.promised(rank).read_bytes;
        assert!(read_bytes.abs_diff(mean) <= plan.machine().buffer_len_bytes + 1, "{read_bytes} of {mean}");
    }
    all.sort_unstable();
    assert!(all.into_iter().eq(0..plan.reads().len() as u32), "every read is one rank's");
    for round in 0..share.round_count() {
        for turn in share.round(round) {
            let reads = &plan.reads()[turn.reads.start as usize..turn.reads.end as usize];
            assert!(reads.iter().map(Read::len_bytes).sum::<u64>() <= plan.machine().buffer_len_bytes);
            assert!(reads.len() as u32 <= (plan.machine().buffer_count / 2).max(1));
        }
    }
    let sum = |of: fn(&tensorhaul_plan::SharePromised) -> u64| {
        (0..size).map(|rank| of(share.promised(rank))).sum::<u64>()
    };
    assert_eq!(sum(|promised| promised.sent_bytes), sum(|promised| promised.received_bytes));
    assert_eq!(sum(|promised| promised.read_bytes), plan.promised().read_bytes);
}

fn rule() -> impl Strategy<Value = Rule> {
    prop_oneof![
        Just(Rule::Replicated),
        (0usize..2).prop_map(Rule::Cut),
        (0usize..8).prop_map(Rule::On),
        Just(Rule::Pairs),
    ]
}

fn specs(shapes: &[(u64, u64)]) -> Vec<Spec> {
    let spec = |(index, (rows, cols)): (usize, &(u64, u64))| {
        (format!("model.layers.{index}.w"), Dtype::U16, vec![*rows, *cols])
    };
    shapes.iter().enumerate().map(spec).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_byte_lands_on_every_rank_that_needs_it(
        tensors in proptest::collection::vec((rule(), 1u64..40, prop_oneof![1u64..40, 1000u64..9000]), 1..8),
        size in 1usize..9,
        pages in 1u64..40,
        buffer_count in 1u32..40,
        over_read_max in prop_oneof![Just(1.0), Just(1.02), Just(100.0)],
    ) {
        let rules: Vec<_> = tensors.iter().map(|(rule, ..)| *rule).collect();
        let shapes: Vec<_> = tensors.iter().map(|(_, rows, cols)| (*rows, *cols)).collect();
        let world = world(&[specs(&shapes)], 8);
        let machine = Machine { buffer_len_bytes: pages * 4096, buffer_count, ..Machine::default() };
        check(&world, &rules, size, &machine, over_read_max);
    }

    #[test]
    fn what_ranks_need_together_is_read_once(
        tensors in proptest::collection::vec((rule(), 1u64..40, prop_oneof![1u64..40, 1000u64..3000]), 1..6),
        size in 1usize..9,
        pages in 1u64..20,
    ) {
        let rules: Vec<_> = tensors.iter().map(|(rule, ..)| *rule).collect();
        let shapes: Vec<_> = tensors.iter().map(|(_, rows, cols)| (*rows, *cols)).collect();
        let world = world(&[specs(&shapes)], 8);
        // Without the covers of direct reads, which may overlap by less than a page.
        let machine = Machine { buffer_len_bytes: pages * 4096, direct_align_bytes: 1, ..Machine::default() };
        let share = check(&world, &rules, size, &machine, 1.02);
        let mut extents: Vec<_> = share.plan().reads().iter().map(|read| read.extent).collect();
        extents.sort_by_key(|extent| extent.offset_bytes);
        for pair in extents.windows(2) {
            prop_assert!(pair[0].end_bytes() <= pair[1].offset_bytes);
        }
        // All of these rules together need every byte of every tensor.
        let needed: u64 = world.checkpoint.tensors().map(|tensor| tensor.info.len_bytes()).sum();
        prop_assert_eq!(share.plan().promised().read_bytes, needed);
    }
}

#[test]
fn a_replicated_tensor_is_packed_once_and_lands_in_place() {
    let world = world(&[specs(&[(64, 4096)])], 8);
    let machine = Machine { buffer_len_bytes: 1 << 20, ..Machine::default() };
    let share = check(&world, &[Rule::Replicated], 4, &machine, 1.02);
    for rank in 0..4 {
        let promised = share.promised(rank);
        assert_eq!(promised.receive_buffer_bytes, 0, "dense messages need none");
        assert!(promised.send_buffer_bytes <= promised.read_bytes, "once for all peers");
    }
    let owner = (0..4).find(|rank| share.promised(*rank).reads > 0).unwrap();
    assert_eq!(
        share.promised(owner).sent_bytes,
        3 * world.checkpoint.tensors().next().unwrap().info.len_bytes()
    );
}

#[test]
fn columns_that_several_ranks_want_are_read_once() {
    let world = world(&[specs(&[(16, 40_000)])], 8);
    let quarter: Kept = vec![(
        "model.layers.0.w".to_owned(),
        vec![SliceRange::from(0..16), SliceRange::from(10_000..20_000)],
    )];
    let ranks = vec![assembly(&world, &quarter); 3];
    let machine = Machine { buffer_len_bytes: 64 << 10, direct_align_bytes: 1, ..Machine::default() };
    let share = Share::new(&world.checkpoint, &ranks, &Request::all(), &machine).unwrap();
    assert_eq!(share.plan().promised().read_bytes, 16 * 10_000 * 2);
    assert!(share.plan().reads().iter().all(|read| read.stride.is_some()), "by their pieces");
    let arenas = Node::run(&world, &share);
    let expected = naive(&world, &quarter[0].0, Some(&quarter[0].1));
    for rank in 0..3 {
        let (_, tensor) = share.tensors(rank).next().unwrap();
        let found = &arenas[tensor.place.arena as usize][tensor.place.offset_bytes as usize..];
        assert!(found[..expected.len()] == expected);
    }
}

#[test]
fn a_share_of_a_small_model_prints_as_expected() {
    let files = [vec![
        ("embed".to_owned(), Dtype::Bf16, vec![64, 64]),
        ("layers.0.up".to_owned(), Dtype::Bf16, vec![96, 64]),
        ("layers.0.down".to_owned(), Dtype::Bf16, vec![64, 96]),
        ("norm".to_owned(), Dtype::Bf16, vec![64]),
    ]];
    let world = world(&files, 8);
    let rules: Vec<Rule> = world
        .checkpoint
        .tensors()
        .map(|tensor| match tensor.info.name {
            "layers.0.up" => Rule::Cut(0),
            "layers.0.down" => Rule::Cut(1),
            _ => Rule::Replicated,
        })
        .collect();
    let machine = Machine { buffer_len_bytes: 8192, buffer_count: 8, ..Machine::default() };
    insta::assert_snapshot!(check(&world, &rules, 2, &machine, 1.02));
}

#[test]
fn what_is_selected_is_read_and_names_are_those_of_any_rank() {
    let world = world(&[specs(&[(64, 64), (64, 64), (64, 64)])], 8);
    let ranks: Vec<_> = (0..2)
        .map(|rank| assembly(&world, &kept(&world, &[Rule::Cut(0), Rule::On(0), Rule::On(1)], rank, 2)))
        .collect();
    let machine = Machine { direct_align_bytes: 1, ..Machine::default() };
    let share = |select| Share::new(&world.checkpoint, &ranks, &Request::of(select), &machine);
    let globs = |globs: &[&str]| Select::Globs(globs.iter().map(|glob| (*glob).to_owned()).collect());
    let selected = share(globs(&["*.0.w", "*.2.w"])).unwrap();
    let names = |rank| selected.tensors(rank).map(|(name, _)| name.to_owned()).collect::<Vec<_>>();
    assert_eq!(names(0), ["model.layers.0.w"]);
    assert_eq!(names(1), ["model.layers.0.w", "model.layers.2.w"]);
    assert_eq!(selected.plan().promised().needed_bytes, 2 * 64 * 64 * 2);
    let unknown = share(Select::Names(vec!["rank0/model.layers.0.w".to_owned()])).unwrap_err();
    assert!(matches!(unknown, ShareError::Plan(PlanError::UnknownTensor { .. })), "{unknown}");
    let nothing = share(globs(&["*.9.w"])).unwrap_err();
    assert!(matches!(nothing, ShareError::Plan(PlanError::NothingMatches { .. })), "{nothing}");
}

#[test]
fn what_cannot_be_shared_is_refused() {
    let world = world(&[specs(&[(4, 4)])], 8);
    let refused = |assemblies: &[Assembly]| {
        Share::new(&world.checkpoint, assemblies, &Request::all(), &Machine::default()).unwrap_err()
    };
    assert_eq!(refused(&[]), ShareError::RankCount { size: 0 });
    assert_eq!(refused(&vec![Assembly::default(); 1025]), ShareError::RankCount { size: 1025 });
    let part = Part { source: Source::Made(0), slice: Slice::new([0..4, 0..4]), at: Dims::from_elem(0, 2) };
    let (name, shape) = ("w".to_owned(), Dims::from_elem(4, 2));
    let made = Assembled { name: name.clone(), shape, device: DeviceId::Host, parts: [part].into() };
    assert_eq!(
        refused(&[Assembly { tensors: vec![made], ..Assembly::default() }]),
        ShareError::Made { name }
    );
}
