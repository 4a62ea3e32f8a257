//! Planning for ranks: DeepSeek-V3's headers (91,991 tensors in 163 files), from rules to the plan of one rank of 8, and of all 8.
//!
//! Nothing is read: the headers are made here, without data. Asked of the whole way from a recognised checkpoint to a plan: at
//! most 150 ms for one rank, 0.6 s for all 8.

use std::hint::black_box;
use std::num::NonZero;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use criterion::{BenchmarkId, Criterion};
use tensorhaul_plan::parallel::{Fuse, ModelConfig, Partition, Ranks, Rules, Setup};
use tensorhaul_plan::quant::{Configs, Survey, Values};
use tensorhaul_plan::{Dequantize, DeviceId, Dtype, Layout, Machine, Plan, Request};

#[path = "../crates/plan/tests/parallel/models.rs"]
mod models;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("ranks");
    group.sample_size(10);
    let model = models::deepseek_v3();
    let checkpoint = Arc::new(model.checkpoint());
    let mut configs = Configs::none();
    configs.insert("config.json", model.config.as_bytes());
    let survey = Survey::new(&checkpoint, &configs).expect("the configuration is well-formed");
    let quantization = survey.recognize(&checkpoint, &Values::none());
    let config = ModelConfig::parse(model.config.as_bytes()).expect("the configuration is well-formed");
    let rules = Rules::of(&config).expect("there is a table for it");
    let dequantize = Dequantize {
        groups: quantization.shared_groups(),
        globs: None,
        dtype: Dtype::Bf16,
        layout: Layout::Rows,
        fold: false,
    };
    let ways = [
        ("stored", None, Fuse::No),
        ("dequantized", Some(&dequantize), Fuse::No),
        ("dequantized_fused", Some(&dequantize), Fuse::All),
    ];
    for (name, dequantize, fuse) in ways {
        let plan = |tp_ranks: &[u32]| -> usize {
            let setup = Setup { quantization: Some(&quantization), dequantize, fuse: fuse.clone() };
            let partition =
                Partition::new(&checkpoint, &config, &rules, &setup).expect("every tensor has a rule");
            let one = |rank: &u32| {
                let share =
                    partition.share(&Ranks::alone().tp(*rank, 8), DeviceId::Host).expect("8 ranks work");
                let mut request = Request::all();
                request.assembly = Some(Arc::new(share.assembly));
                request.dequantize = dequantize.cloned();
                let plan = Plan::new(&checkpoint, black_box(&request), &Machine::default());
                plan.expect("it fits").reads().len()
            };
            // As `Model::plan_ranks` does: on as many threads as there are processors, one after the other on each.
            let threads = thread::available_parallelism().map_or(1, NonZero::get);
            let count = |some: &[u32]| some.iter().map(one).sum::<usize>();
            if let [_] = tp_ranks {
                return count(tp_ranks); // As `Model::plan` does.
            }
            thread::scope(|scope| {
                let some = tp_ranks.chunks(tp_ranks.len().div_ceil(threads));
                let threads: Vec<_> = some.map(|some| scope.spawn(move || count(some))).collect();
                threads.into_iter().map(|thread| thread.join().expect("planning does not panic")).sum()
            })
        };
        let start = Instant::now();
        plan(&[3]);
        eprintln!("ranks/{name}/one_of_8: the first took {:.0?}", start.elapsed());
        for (what, tp_ranks) in [("one_of_8", &[3][..]), ("all_8", &[0, 1, 2, 3, 4, 5, 6, 7])] {
            group.bench_function(BenchmarkId::new(name, what), |bencher| bencher.iter(|| plan(tp_ranks)));
        }
    }
    group.finish();
    criterion.final_summary();
}
