//! What all ranks of a model read together stays inside the bound, or their plans name tensors that account for the rest.

use std::sync::Arc;

use tensorhaul_plan::parallel::{Fuse, ModelConfig, Partition, Ranks, Rules, Setup};
use tensorhaul_plan::{DeviceId, InPlace, Machine, OverReadReason, Plan, Request};

use crate::golden::{all, recognize};
use crate::models::{self, Model};
use crate::property::{fits, zoo};

/// What the plans of some ranks read, and what they say of it.
#[derive(Default)]
struct Reading {
    read_bytes: u64,
    needed_bytes: u64,
    told_bytes: u64,
}

impl Reading {
    fn add(&mut self, plan: &Plan, over_read_max: f64) {
        let promised = plan.promised();
        let lens = plan.reads().iter().map(|read| (read.len_bytes(), read.payload_bytes));
        let (read, needed) = lens.fold((0, 0), |(read, needed), lens| (read + lens.0, needed + lens.1));
        assert_eq!((promised.read_bytes, promised.needed_bytes), (read, needed));
        let told: u64 = plan.over_reads().iter().map(|over| over.over_bytes).sum();
        let allowed = (needed as f64 * over_read_max) as u64;
        assert!(read <= allowed + told, "{:?}\n{plan}", plan.over_reads());
        assert!(told == 0 || read > allowed, "nothing is told where nothing is too much: {promised:?}");
        // No more is told than it takes.
        let least = plan.over_reads().last().map_or(0, |over| over.over_bytes);
        assert!(told == 0 || allowed + told - least < read, "{promised:?}");
        self.read_bytes += read;
        self.needed_bytes += needed;
        self.told_bytes += told;
    }

    /// Returns by what factor more is read than needed, beside what is told.
    fn factor(&self) -> f64 {
        self.read_bytes.saturating_sub(self.told_bytes) as f64 / self.needed_bytes as f64
    }
}

/// Plans for all ranks of the groups, and hands over what each group reads.
fn for_groups(
    model: &Model,
    is_dequantized: bool,
    groups: &[(u32, u32)],
    machine: &Machine,
    over_read_max: f64,
    mut check: impl FnMut(u32, &Reading, &[Plan]),
) {
    let checkpoint = Arc::new(model.checkpoint());
    let quantization = recognize(&checkpoint, model);
    let dequantize = all(&quantization);
    let dequantize = is_dequantized.then_some(&dequantize);
    let config = ModelConfig::parse(model.config.as_bytes()).unwrap();
    let rules = Rules::of(&config).unwrap();
    let setup = Setup { quantization: Some(&quantization), dequantize, fuse: Fuse::No };
    let partition = Partition::new(&checkpoint, &config, &rules, &setup).unwrap();
    for (tp, pp) in groups.iter().copied() {
        let plan = |ranks: Ranks| {
            let mut request = Request::all();
            request.assembly = Some(Arc::new(partition.share(&ranks, DeviceId::Cuda(0)).unwrap().assembly));
            request.dequantize = dequantize.cloned();
            request.over_read_max = over_read_max;
            Plan::new(&checkpoint, &request, machine).unwrap()
        };
        let plans: Vec<Plan> = Ranks::all(tp, pp, 1).map(plan).collect();
        let mut reading = Reading::default();
        plans.iter().for_each(|plan| reading.add(plan, over_read_max));
        check(tp, &reading, &plans);
    }
}

/// Every size of tensor-parallel groups with every number of stages.
fn all_groups() -> Vec<(u32, u32)> {
    [1, 2, 3, 4, 8].into_iter().flat_map(|tp| (1..=4).map(move |pp| (tp, pp))).collect()
}

fn machines() -> [Machine; 3] {
    [
        Machine { direct_align_bytes: 1, ..Machine::default() },
        Machine { direct_align_bytes: 512, ..Machine::default() },
        Machine { in_place: InPlace::shared(DeviceId::Cuda(0), 4 << 20), ..Machine::default() },
    ]
}

#[test]
fn small_models_of_every_architecture_stay_inside_any_bound() {
    for (model, sizes) in zoo() {
        let groups = all_groups();
        let groups: Vec<_> = groups.into_iter().filter(|(tp, _)| fits(&sizes, u64::from(*tp))).collect();
        for (machine, over_read_max) in machines().iter().zip([1.02, 1.0, 1.5]) {
            for_groups(&model, true, &groups, machine, over_read_max, |_, reading, _| {
                assert!(reading.factor() <= over_read_max, "{}", reading.factor());
            });
        }
    }
}

#[test]
fn published_models_stay_inside_the_bound_but_for_pieces_shorter_than_is_worth_a_request() {
    // Ranks divide rows of gpt-oss's experts: 90 blocks of 16 bytes, and 90 scales of one.
    for (model, is_dequantized, tp_of_short) in [
        (models::llama_3_8b(), false, u32::MAX),
        (models::mixtral_8x7b(), false, u32::MAX),
        (models::gpt_oss_120b(), true, 2),
    ] {
        let groups: Vec<_> = all_groups().into_iter().filter(|(tp, _)| *tp != 3).collect();
        for machine in machines() {
            for_groups(&model, is_dequantized, &groups, &machine, 1.02, |tp, reading, plans| {
                assert!(reading.factor() <= 1.02, "{}", reading.factor());
                assert!(reading.told_bytes == 0 || tp >= tp_of_short, "{tp}");
                assert!(reading.told_bytes > 0 || tp < 4 || tp < tp_of_short, "{tp}");
                for over in plans.iter().flat_map(Plan::over_reads) {
                    let is_short = matches!(
                        over.reason,
                        OverReadReason::ShortPieces { piece_len_bytes } if piece_len_bytes < 512
                    );
                    assert!(is_short && over.name.contains("experts.down_proj"), "{over:?}");
                }
            });
        }
    }
}

#[test]
fn deepseeks_narrow_columns_pass_the_bound_and_are_told() {
    for_groups(&models::deepseek_v3(), false, &[(8, 1)], &Machine::default(), 1.02, |_, reading, plans| {
        assert!(reading.factor() <= 1.02, "{}", reading.factor());
        assert!(reading.told_bytes > 0);
        let told = plans.iter().flat_map(Plan::over_reads);
        let mut told = told.map(|over| (over.name.ends_with("down_proj.weight"), over.reason));
        assert!(told.all(|told| told == (true, OverReadReason::ShortPieces { piece_len_bytes: 256 })));
    });
}
