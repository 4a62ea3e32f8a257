//! Loads of generated checkpoints by generated device maps, over generated machines: whatever was asked for, every byte arrives.
//!
//! `TENSORHAUL_TEST_CASES` is how many, `TENSORHAUL_TEST_SEED` which. What fails is made smaller and printed.

use std::collections::BTreeMap;
use std::env;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use tensorhaul::save::{SaveOptions, SaveTensor, save};
use tensorhaul::{
    Compatibility, Dequantization, DeviceId, DeviceMap, Dtype, EngineChoice, LoadOptions, Loaded, Model,
    Plan, Preference,
};

use crate::suite::sim::Sim;
use crate::vendor::id;

/// Everything that decides what a load does.
#[derive(Clone, Debug)]
struct Case {
    layers: Vec<Layer>,
    shard_bytes: u64,
    machine: Machine,
    engine: EngineChoice,
    in_place: Preference,
    direct_storage: Preference,
    /// For each device.
    staging_bytes: u64,
    /// The result's, where packed tensors become numbers.
    dequantized: Option<Dtype>,
    /// Beyond what the largest packed tensor takes.
    transient_spare_bytes: u64,
}

/// Tensors that go to the same devices.
#[derive(Clone, Debug)]
struct Layer {
    /// Numbers of elements.
    plain: Vec<(Dtype, u64)>,
    /// Rows of codes.
    packed: Vec<u64>,
    /// In this order; [`HOST`] is the host.
    devices: Vec<u32>,
}

#[derive(Clone, Debug)]
struct Machine {
    settings: String,
    device_count: u32,
}

/// A device's number that stands for the host.
const HOST: u32 = 4;

/// Of a packed tensor.
const COLUMNS: u64 = 256;

fn layers(device_count: u32) -> impl Strategy<Value = Vec<Layer>> {
    let numel = prop_oneof![3 => 0..300u64, 3 => 2_000..40_000u64, 1 => 100_000..300_000u64];
    let plain = vec((select(vec![Dtype::U8, Dtype::Bf16, Dtype::F32]), numel), 0..4);
    let packed = vec(prop_oneof![1 => 1..40u64, 2 => 100..1500u64], 0..4);
    let numbers: Vec<_> = (0..device_count).chain([HOST]).collect();
    // The host is as likely as any one device.
    let devices = subsequence(numbers, 1..=device_count as usize).prop_shuffle();
    let layer = (plain, packed, devices);
    vec(layer.prop_map(|(plain, packed, devices)| Layer { plain, packed, devices }), 1..14)
}

fn machine() -> impl Strategy<Value = Machine> {
    let peers =
        prop_oneof![Just(""), Just("peers=0;"), Just("no_peer=0:1;"), Just("no_peer=1:0;no_peer=0:2;")];
    let delay = prop_oneof![Just(0), Just(80), Just(400)];
    let features = select(vec!["", "pools=0;", "batches=0;", "unified=0;", "integrated=1;"]);
    (1..=4u32, peers, delay, any::<u16>(), features).prop_map(
        |(device_count, peers, delay_us, seed, feature)| {
            let settings = format!("devices={device_count};{peers}{feature}delay_us={delay_us};seed={seed}");
            Machine { settings, device_count }
        },
    )
}

fn case() -> impl Strategy<Value = Case> {
    let sizes = (select(vec![60_000u64, 400_000, u64::MAX]), select(vec![4096u64, 20_000, 65_536, 1 << 20]));
    let engine =
        select(vec![EngineChoice::Auto, EngineChoice::Pread, EngineChoice::IoUring, EngineChoice::Mmap]);
    let ways = (
        engine,
        select(vec![Preference::Preferred, Preference::Off]),
        select(vec![Preference::Off, Preference::Preferred, Preference::Required]),
    );
    let dequantized = select(vec![None, Some(Dtype::Bf16), Some(Dtype::F32)]);
    let spare = select(vec![16_384u64, 70_000, 1 << 20]);
    machine().prop_flat_map(move |machine| {
        let layers = layers(machine.device_count);
        let rest = (sizes.clone(), ways.clone(), dequantized.clone(), spare.clone());
        (Just(machine), layers, rest).prop_map(
            |(
                machine,
                layers,
                (
                    (shard_bytes, staging_bytes),
                    (engine, in_place, direct_storage),
                    dequantized,
                    transient_spare_bytes,
                ),
            )| Case {
                layers,
                shard_bytes,
                machine,
                engine,
                in_place,
                direct_storage,
                staging_bytes,
                dequantized,
                transient_spare_bytes,
            },
        )
    })
}

impl Case {
    /// Writes the checkpoint; its bytes are codes that stand for numbers, and no two places have the same.
    fn write(&self, folder: &Path) -> Model {
        let bytes: Vec<u8> =
            (0..4_000_000u32).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 25) as u8 & 0x7b).collect();
        let scale = 0.5f32.to_le_bytes();
        let mut tensors = Vec::new();
        let mut from = 0;
        for (number, layer) in self.layers.iter().enumerate() {
            let mut add = |name: String, dtype: Dtype, shape: Vec<u64>| {
                let len_bytes = dtype.len_bytes(shape.iter().product()).unwrap() as usize;
                let bytes = &bytes[from..from + len_bytes];
                from += 1 + len_bytes % 7;
                tensors.push(SaveTensor { name, dtype, shape, bytes: Box::new(bytes) });
            };
            for (at, (dtype, numel)) in layer.plain.iter().enumerate() {
                add(format!("layers.{number}.plain.{at}"), *dtype, vec![*numel]);
            }
            for (at, rows) in layer.packed.iter().enumerate() {
                add(format!("layers.{number}.packed.{at}.weight"), Dtype::F8E4m3, vec![*rows, COLUMNS]);
            }
            for at in 0..layer.packed.len() {
                tensors.push(SaveTensor {
                    name: format!("layers.{number}.packed.{at}.weight_scale"),
                    dtype: Dtype::F32,
                    shape: vec![1],
                    bytes: Box::new(&scale[..]),
                });
            }
        }
        save(folder, tensors, &SaveOptions::default().max_shard_bytes(self.shard_bytes)).unwrap();
        let config = r#"{"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}}"#;
        std::fs::write(folder.join("config.json"), config).unwrap();
        Model::open(folder).unwrap()
    }

    fn is_empty(&self) -> bool {
        self.layers.iter().all(|layer| layer.plain.is_empty() && layer.packed.is_empty())
    }

    fn map(&self) -> DeviceMap {
        let filled = self.layers.iter().enumerate();
        let filled = filled.filter(|(_, layer)| !(layer.plain.is_empty() && layer.packed.is_empty()));
        let device = |number: &u32| if *number == HOST { DeviceId::Host } else { id(*number) };
        let entry = |(number, layer): (usize, &Layer)| {
            (format!("layers.{number}"), layer.devices.iter().map(device).collect::<Vec<_>>())
        };
        DeviceMap::new(filled.map(entry)).unwrap()
    }

    fn dequantize(&self, options: LoadOptions) -> LoadOptions {
        match self.dequantized {
            Some(dtype) => options.dequantize(Dequantization::to(dtype)),
            None => options,
        }
    }

    /// Nothing can be required of a machine whose devices take reads as the host's memory does, or of a load onto the host.
    fn direct_storage(&self, map: &DeviceMap) -> Preference {
        let has_devices = map.devices().iter().any(|device| *device != DeviceId::Host);
        match self.direct_storage {
            Preference::Required if !has_devices || self.machine.settings.contains("integrated=1") => {
                Preference::Preferred
            }
            preference => preference,
        }
    }

    fn options(&self, map: &DeviceMap) -> LoadOptions {
        let longest =
            self.layers.iter().flat_map(|layer| &layer.packed).max().map_or(0, |rows| rows * COLUMNS);
        self.dequantize(LoadOptions::default())
            .device_map(map.clone())
            .staging_bytes(self.staging_bytes * map.devices().len() as u64)
            .engine(self.engine)
            .in_place(self.in_place)
            .direct_storage(self.direct_storage(map))
            // AMD's library is asked for it, since it cannot be told otherwise.
            .direct_compatibility(Compatibility::Allowed)
            // Little more than the longest, so that places are taken again.
            .transient_bytes(longest + self.transient_spare_bytes)
            .checksums(true)
    }

    /// Returns how much came by direct storage.
    fn check(&self) -> u64 {
        if self.is_empty() {
            return 0;
        }
        let mut by_storage_bytes = 0;
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let model = self.write(folder.path());
        let expected = model.load(&self.dequantize(LoadOptions::default())).unwrap();
        let map = self.map();
        let sim = Sim::new(&self.machine.settings);
        let options = self.options(&map);
        let plan = model.plan_for_devices(&options).unwrap();
        assert_reads_each_byte_once(&model, &plan);
        for round in 0..2 {
            let loaded = model.load(&options).unwrap_or_else(|error| panic!("{}", error.one_line()));
            assert_same(&expected, &loaded, &map);
            by_storage_bytes += loaded.report.bytes_direct_storage;
            assert_promised(&loaded, self.staging_bytes * map.devices().len() as u64);
            drop(loaded);
            if round == 1 {
                tensorhaul::release_devices();
            }
        }
        sim.assert_clean("after the loads");
        by_storage_bytes
    }
}

/// Compares what is on every device that the map names with what the host makes of the same files.
fn assert_same(expected: &Loaded, loaded: &Loaded, map: &DeviceMap) {
    let mut count = 0;
    for (name, expected) in expected.tensors.iter() {
        for device in map.devices_of(name).unwrap() {
            let tensor = loaded.tensors.get_on(name, *device).unwrap_or_else(|| panic!("{name} on {device}"));
            assert_eq!((tensor.dtype(), tensor.shape()), (expected.dtype(), expected.shape()), "{name}");
            assert!(tensor.to_host().unwrap() == expected.bytes().unwrap(), "{name} on {device}");
            count += 1;
        }
    }
    assert_eq!(loaded.tensors.len(), count);
    assert_eq!(loaded.report.checksums.as_ref().unwrap().len(), expected.tensors.len());
}

/// What was promised is what was taken, with what the load's own plan promised: the page cache, which others use too, decides which reads are
/// direct, and so how places are rounded.
fn assert_promised(loaded: &Loaded, staging_bytes: u64) {
    let report = &loaded.report;
    let promised = &report.promised;
    assert!(report.peak_staging_bytes <= promised.peak_staging_bytes);
    assert!(promised.peak_staging_bytes <= staging_bytes);
    assert!(report.peak_host_bytes <= promised.peak_host_bytes);
    let sum = |of: fn(&tensorhaul::DeviceReport) -> u64| report.devices.iter().map(of).sum::<u64>();
    assert_eq!(sum(|device| device.target_bytes), promised.target_bytes);
    assert_eq!(sum(|device| device.reads), report.reads);
    assert!(
        report.devices.iter().map(|device| device.transient_bytes).sum::<u64>() <= promised.transient_bytes
    );
}

/// Reads of a plan cover every byte of its tensors, and none twice, but for pages where direct reads meet, and for gaps between small sources of
/// operations, which are read before everything else.
fn assert_reads_each_byte_once(model: &Model, plan: &Plan) {
    let page = plan.machine().direct_align_bytes;
    let twice_max = if plan.operations().is_empty() { page } else { page.max(GAP_LEN_BYTES_MAX) };
    let mut files: BTreeMap<u32, Vec<(u64, u64)>> = BTreeMap::new();
    for read in plan.reads() {
        let begin = read.extent.offset_bytes;
        files.entry(read.extent.file).or_default().push((begin, begin + read.extent.len_bytes));
    }
    for reads in files.values_mut() {
        reads.sort_unstable();
        let shared = |pair: &[(u64, u64)]| pair[0].1.saturating_sub(pair[1].0);
        assert!(reads.windows(2).all(|pair| shared(pair) <= twice_max), "{reads:?}");
    }
    for tensor in plan.checkpoint().tensors() {
        let (begin, len_bytes) = (tensor.file_offset_bytes, tensor.info.len_bytes());
        let reads = files.get(&tensor.file).map_or(&[][..], Vec::as_slice);
        let mut covered = begin;
        for (from, to) in reads {
            if *from <= covered {
                covered = covered.max(*to);
            }
        }
        assert!(covered >= begin + len_bytes, "{} is not read", tensor.info.name);
    }
    assert_eq!(model.checkpoint().len(), plan.checkpoint().len());
}

#[test]
fn whatever_is_asked_for_every_byte_arrives_on_every_device() {
    let number = |name: &str, otherwise| env::var(name).map_or(otherwise, |text| text.parse().expect(name));
    let (cases, seed) = (number("TENSORHAUL_TEST_CASES", 24), number("TENSORHAUL_TEST_SEED", 1));
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&u64::to_le_bytes(seed));
    let config =
        Config { cases: cases as u32, max_shrink_iters: 200, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let by_storage_bytes = AtomicU64::new(0);
    let checked = runner.run(&case(), |case| {
        let (over, is_over) = mpsc::channel::<()>();
        let told = format!("seed {seed}: hangs: {case:#?}");
        std::thread::scope(|scope| {
            // A load that hangs cannot be stopped from outside: the process ends, and says of what.
            scope.spawn(move || {
                if is_over.recv_timeout(LONGEST) == Err(RecvTimeoutError::Timeout) {
                    eprintln!("{told}");
                    std::process::abort();
                }
            });
            let over = over; // Dropped when the case has ended, however it does.
            by_storage_bytes.fetch_add(case.check(), Ordering::Relaxed);
            drop(over);
        });
        Ok(())
    });
    checked.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    // A few cases may all happen to ask for none.
    assert!(cases < 16 || by_storage_bytes.into_inner() > 0, "nothing came by direct storage");
}

/// The planner's: a gap that is cheaper read than skipped.
const GAP_LEN_BYTES_MAX: u64 = 32 << 10;

/// Far longer than any case takes, on a machine that is busy with something else.
const LONGEST: Duration = Duration::from_secs(120);
