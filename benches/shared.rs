//! What eight ranks of a node that share their reading ask of storage, of their links and of their memory: counts of plans, no clock.
//!
//! Nothing is read: the headers are made here, without data. Asked of all models: at most 1.02 times the bytes that are needed.

use std::sync::Arc;

use tensorhaul_plan::parallel::{Fuse, ModelConfig, Partition, Ranks, Rules, Setup};
use tensorhaul_plan::quant::{Configs, Survey, Values};
use tensorhaul_plan::{Dequantize, DeviceId, Dtype, Layout, Machine, Request, Share};

#[path = "../crates/plan/tests/parallel/models.rs"]
mod models;

const SIZE: u32 = 8;

fn main() {
    println!(
        "| | needed | read by all | times | most by one | received by all | rounds | result | exchange | sources |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    print("Llama-3-8B, `tp 8`", &models::llama_3_8b(), false, tp);
    print("Mixtral-8x7B, `tp 8`", &models::mixtral_8x7b(), false, tp);
    print("Mixtral-8x7B, `tp 8`, `ep 8`, whole experts", &models::mixtral_8x7b(), false, tp_and_ep);
    print("DeepSeek-V3, `tp 8`, dequantized", &models::deepseek_v3(), true, tp);
    print("DeepSeek-V3, `tp 8`, `ep 8`, whole experts, dequantized", &models::deepseek_v3(), true, tp_and_ep);
}

fn tp(rank: u32) -> Ranks {
    Ranks::alone().tp(rank, SIZE)
}

fn tp_and_ep(rank: u32) -> Ranks {
    tp(rank).ep(rank, SIZE).whole_experts()
}

fn print(name: &str, model: &models::Model, is_dequantized: bool, rank: fn(u32) -> Ranks) {
    let checkpoint = Arc::new(model.checkpoint());
    let mut configs = Configs::none();
    configs.insert("config.json", model.config.as_bytes());
    let survey = Survey::new(&checkpoint, &configs).expect("the configuration is well-formed");
    let quantization = survey.recognize(&checkpoint, &Values::none());
    let config = ModelConfig::parse(model.config.as_bytes()).expect("the configuration is well-formed");
    let rules = Rules::of(&config).expect("there is a table for it");
    let dequantize = is_dequantized.then(|| Dequantize {
        groups: quantization.shared_groups(),
        globs: None,
        dtype: Dtype::Bf16,
        layout: Layout::Rows,
        fold: false,
    });
    let setup = Setup { quantization: Some(&quantization), dequantize: dequantize.as_ref(), fuse: Fuse::No };
    let partition = Partition::new(&checkpoint, &config, &rules, &setup).expect("every tensor has a rule");
    let assembly = |number| partition.share(&rank(number), DeviceId::Host).expect("8 ranks work").assembly;
    let assemblies: Vec<_> = (0..SIZE).map(assembly).collect();
    let mut request = Request::all();
    request.dequantize = dequantize.clone();
    let share = Share::new(&checkpoint, &assemblies, &request, &Machine::default()).expect("it fits");
    let promised = share.plan().promised();
    let all = || (0..SIZE).map(|rank| share.promised(rank));
    let times = promised.read_bytes as f64 / promised.needed_bytes as f64;
    println!(
        "| {name} | {} | {} | {times:.4} | {} | {} | {} | {} | {} | {} |",
        gb(promised.needed_bytes),
        gb(promised.read_bytes),
        gb(all().map(|rank| rank.read_bytes).max().unwrap_or(0)),
        gb(all().map(|rank| rank.received_bytes).sum()),
        share.round_count(),
        gb(all().map(|rank| rank.target_bytes).max().unwrap_or(0)),
        mib(all().map(|rank| rank.exchange_bytes()).max().unwrap_or(0)),
        mib(all().map(|rank| rank.transient_bytes).max().unwrap_or(0)),
    );
    assert!(times <= 1.02, "{name} is read {times} times");
}

fn gb(bytes: u64) -> String {
    format!("{:.2} GB", bytes as f64 / 1e9)
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
