//! Parsing headers of 100,000 and 1,000,000 tensors, beside the reference crate.
//!
//! The names are those of a mixture-of-experts checkpoint, about 100 bytes of JSON per
//! tensor. `shuffled` lists the same tensors out of the order of their data, as writers that sort by name do.
//! The reference parses the same bytes to the same checks (`Metadata`), without the data behind them.

use std::hint::black_box;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tensorhaul_plan::header::Header;

fn parse(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("header");
    group.sample_size(10);
    for tensor_count in [100_000, 1_000_000] {
        for (order, step) in [("in_order", 1), ("shuffled", 7_919)] {
            let (json, data_len_bytes) = moe_header(tensor_count, step);
            let file_len_bytes = 8 + json.len() as u64 + data_len_bytes;
            assert_eq!(Header::parse(&json, file_len_bytes).map(|header| header.len()), Ok(tensor_count));
            group.throughput(Throughput::Bytes(json.len() as u64));
            group.bench_function(BenchmarkId::new(format!("tensorhaul/{order}"), tensor_count), |bencher| {
                bencher.iter_batched(
                    || (),
                    |()| Header::parse(black_box(&json), file_len_bytes),
                    BatchSize::PerIteration,
                );
            });
            group.bench_function(BenchmarkId::new(format!("reference/{order}"), tensor_count), |bencher| {
                bencher.iter_batched(
                    || (),
                    |()| serde_json::from_slice::<safetensors::tensor::Metadata>(black_box(&json)),
                    BatchSize::PerIteration,
                );
            });
        }
    }
    group.finish();
}

/// Returns the JSON of a header whose entries are listed `step` apart, and the length of its data.
fn moe_header(tensor_count: usize, step: usize) -> (Vec<u8>, u64) {
    const EXPERTS_PER_LAYER: usize = 256;
    let mut start_bytes = 0;
    let entries: Vec<String> = (0..tensor_count)
        .map(|index| {
            let (expert_index, part) = (index / 3, ["w1", "w2", "w3"][index % 3]);
            let (layer, expert) = (expert_index / EXPERTS_PER_LAYER, expert_index % EXPERTS_PER_LAYER);
            let shape = if part == "w2" { "[32,16]" } else { "[16,32]" };
            let end_bytes = start_bytes + 2 * 16 * 32;
            let entry = format!(
                "\"layers.{layer}.experts.{expert}.{part}\":{{\"dtype\":\"BF16\",\
                 \"shape\":{shape},\"data_offsets\":[{start_bytes},{end_bytes}]}}"
            );
            start_bytes = end_bytes;
            entry
        })
        .collect();
    // `step` is prime to both counts, so that each entry is listed once.
    let listed: Vec<&str> = (0..tensor_count).map(|place| &*entries[place * step % tensor_count]).collect();
    (format!("{{{}}}", listed.join(",")).into_bytes(), start_bytes)
}

criterion_group!(benches, parse);
criterion_main!(benches);
