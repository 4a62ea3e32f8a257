//! Whatever the engine, the memory and the page cache: the tensors are the file's, byte for byte, and the
//! report's figures fit each other.

use std::path::Path;
use std::sync::{Arc, Mutex};

use tensorhaul::{
    Dtype, EngineChoice, Faults, Handover, LoadOptions, Model, Preference, Progress, Report, Request, Select,
};
use xxhash_rust::xxh3::xxh3_64;

use crate::common::{
    ATTEMPTS, Cache, Dice, Folder, Reference, Shard, assert_consistent, assert_same, awkward, encode, evict,
    in_memory_files, load_with, reference, reference_of, skip, stored, warm,
};

#[test]
fn every_engine_hands_over_the_same_bytes_from_a_disk() {
    let folder = Folder::on_disk();
    let paths = folder.checkpoint(&awkward());
    let expected = reference(&paths);
    for way in every_way() {
        for cache in [Cache::Hot, Cache::Cold] {
            let Some(loaded) = load_with(cache, folder.path(), &paths, &way.options()) else { continue };
            assert_same(loaded.tensors.iter(), &expected, &format!("{cache:?}, {way:?}"));
            way.assert_figures(&loaded.report, cache);
        }
    }
}

#[test]
fn every_engine_hands_over_the_same_bytes_from_a_filesystem_in_memory() {
    let Some(folder) = Folder::in_memory() else { return };
    let expected = reference(&folder.checkpoint(&awkward()));
    for way in every_way() {
        let loaded = Model::open(folder.path()).unwrap().load(&way.options()).unwrap();
        assert_same(loaded.tensors.iter(), &expected, &format!("{way:?}"));
        way.assert_figures(&loaded.report, Cache::Hot);
    }
}

#[test]
fn bytes_in_memory_load_like_files() {
    let files = in_memory_files(&awkward());
    let expected = reference_of(files.iter().map(|(_, bytes)| &**bytes));
    for way in every_way() {
        let model = Model::from_memory(files.clone(), Faults::default()).unwrap();
        let loaded = model.load(&way.options()).unwrap();
        assert_same(loaded.tensors.iter(), &expected, &format!("{way:?}"));
        assert_consistent(&loaded.report, way.staging_bytes, &format!("{way:?}"));
        assert_eq!(loaded.report.engine, "memory");
    }
}

#[test]
fn mapped_tensors_are_the_files_bytes_lazy_or_resident_hot_or_cold() {
    let folder = Folder::on_disk();
    let paths = folder.checkpoint(&awkward());
    let expected = reference(&paths);
    for engine in [EngineChoice::Auto, EngineChoice::Mmap] {
        let mapped = LoadOptions::default().engine(engine).handover(Handover::Mapped);
        for (resident, cache) in
            [(false, Cache::Hot), (false, Cache::Cold), (true, Cache::Hot), (true, Cache::Cold)]
        {
            let options = mapped.clone().resident(resident);
            let Some(loaded) = load_with(cache, folder.path(), &paths, &options) else { continue };
            let report = loaded.report;
            assert!(loaded.tensors.iter().all(|(_, tensor)| tensor.is_mapped()));
            assert_eq!(
                (report.engine.as_str(), report.handover, report.resident),
                ("mmap", "mapped", resident)
            );
            assert_eq!((report.peak_staging_bytes, report.peak_host_bytes), (0, 0));
            assert_consistent(&report, 0, &format!("{options:?}"));
            assert_same(loaded.tensors.iter(), &expected, &format!("{options:?}"));
        }
    }
}

#[test]
fn a_half_hot_file_takes_both_paths_and_the_report_says_so() {
    let folder = Folder::on_disk();
    let path = folder.write("half.safetensors", &encode(&[stored("w", Dtype::U8, &[HALF_HOT_LEN_BYTES])], 0));
    let expected = reference(std::slice::from_ref(&path));
    for in_place in [Preference::Preferred, Preference::Off] {
        for engine in [EngineChoice::Auto, EngineChoice::Pread, EngineChoice::IoUring] {
            let options = LoadOptions::default()
                .handover(Handover::Private)
                .engine(engine)
                .in_place(in_place)
                .staging_bytes(1 << 20);
            // What was warmed may be reclaimed before the load looks at it.
            let reports = (0..ATTEMPTS).map(|_| load_half_hot(&path, &options, &expected));
            let is_half = |report: &Report| {
                !report.fallbacks.is_empty()
                    || report.bytes_hot.abs_diff(HALF_HOT_LEN_BYTES / 2) <= HALF_HOT_SLACK_BYTES
            };
            let found = reports.into_iter().find(|report| report.as_ref().is_none_or(is_half));
            let Some(report) = found.expect("a load finds half of the file in the page cache") else {
                return;
            };
            if !report.fallbacks.is_empty() {
                skip(&format!("{:?}", report.fallbacks));
                continue;
            }
            assert!(report.bytes_direct.abs_diff(report.bytes_cold) <= 8192, "{report:?}");
            let both = match engine {
                EngineChoice::Auto => "pread+io-uring",
                EngineChoice::Pread => "pread",
                _ => "io-uring",
            };
            assert_eq!(report.engine, both);
        }
    }
}

/// Loads a file of which the first half is in the page cache; `None` where the rest cannot be dropped from it.
fn load_half_hot(path: &Path, options: &LoadOptions, expected: &Reference) -> Option<Report> {
    let model = Model::open(path).unwrap();
    if !evict(path) {
        return None;
    }
    warm(path, 0, HALF_HOT_LEN_BYTES / 2);
    let loaded = model.load(options).unwrap();
    assert_same(loaded.tensors.iter(), expected, &format!("{options:?}"));
    assert_consistent(&loaded.report, 1 << 20, &format!("{options:?}"));
    Some(loaded.report)
}

#[test]
fn a_cold_load_leaves_the_page_cache_as_it_was() {
    let folder = Folder::on_disk();
    let path = folder.write("cold.safetensors", &encode(&[stored("w", Dtype::U8, &[HALF_HOT_LEN_BYTES])], 0));
    let model = Model::open(&path).unwrap();
    if !evict(&path) {
        return;
    }
    let report = model.load(&LoadOptions::default().handover(Handover::Private)).unwrap().report;
    if !report.fallbacks.is_empty() {
        return skip(&format!("{:?}", report.fallbacks));
    }
    let file = std::fs::File::open(&path).unwrap();
    match tensorhaul_io::probe::cached_bytes(&file, 0, HALF_HOT_LEN_BYTES) {
        // The first block, read both ways to prove that direct reads work, and the read-ahead behind it.
        Some(cached) => assert!(cached <= 512 << 10, "{cached} bytes came into the page cache"),
        None => skip("this kernel has no cachestat"),
    }
}

#[test]
fn checksums_are_of_the_bytes_handed_over() {
    let folder = Folder::on_disk();
    let expected = reference(&folder.checkpoint(&awkward()));
    let mapped = LoadOptions::default().checksums(true);
    let ways = every_way().into_iter().step_by(5).map(|way| way.options().checksums(true));
    for options in ways.chain([mapped]) {
        let report = Model::open(folder.path()).unwrap().load(&options).unwrap().report;
        let checksums = report.checksums.unwrap();
        assert_eq!(checksums.len(), expected.len());
        for (name, (_, _, bytes)) in &expected {
            assert_eq!(checksums[name], format!("{:016x}", xxh3_64(bytes)), "{name}, {options:?}");
        }
        assert!(report.resident);
    }
}

#[test]
fn the_plan_shown_is_the_plan_done() {
    let folder = Folder::on_disk();
    let paths = folder.checkpoint(&awkward());
    for way in every_way() {
        let model = Model::open(folder.path()).unwrap();
        let Some(loaded) = load_with(Cache::Hot, folder.path(), &paths, &way.options()) else { return };
        let promised = loaded.report.promised;
        let plans = (0..ATTEMPTS).map(|_| {
            paths.iter().for_each(|path| drop(std::fs::read(path).unwrap()));
            *model.plan(&way.options()).unwrap().promised()
        });
        assert!(plans.into_iter().any(|plan| plan == promised), "{way:?}: {promised:?}");
    }
}

#[test]
fn progress_grows_to_the_totals_it_announces() {
    let folder = Folder::on_disk();
    folder.checkpoint(&awkward());
    let mapped = LoadOptions::default().resident(true);
    for options in every_way().into_iter().step_by(3).map(Way::options).chain([mapped]) {
        let seen: Arc<Mutex<Vec<Progress>>> = Arc::default();
        let options = options.on_progress({
            let seen = Arc::clone(&seen);
            move |progress| seen.lock().unwrap().push(progress)
        });
        let report = Model::open(folder.path()).unwrap().load(&options).unwrap().report;
        let seen = seen.lock().unwrap();
        assert!(
            seen.is_sorted_by_key(|progress| (progress.read_bytes, progress.ready_tensors)),
            "{options:?}"
        );
        let last = seen.last().unwrap();
        assert_eq!(
            (last.read_bytes, last.total_bytes),
            (report.promised.read_bytes, report.promised.read_bytes),
            "{options:?}"
        );
        assert_eq!(last.total_tensors, report.tensors);
        assert!(seen.iter().all(|progress| progress.total_bytes == last.total_bytes));
        assert!(last.ready_tensors <= report.tensors && last.ready_tensors > 0, "{last:?}");
    }
}

#[test]
fn a_selection_of_one_file_is_not_disturbed_by_the_others() {
    let folder = Folder::on_disk();
    let paths = folder.checkpoint(&awkward());
    let mut expected = reference(&paths[..1]);
    expected.retain(|name, _| name.starts_with("model.layers.0."));
    let request = Request::of(Select::Globs(vec!["model.layers.0.*".to_owned()]));
    for handover in [Handover::Mapped, Handover::Private] {
        let options = LoadOptions::default().handover(handover).request(request.clone());
        let loaded = Model::open(folder.path()).unwrap().load(&options).unwrap();
        assert_same(loaded.tensors.iter(), &expected, &format!("{options:?}"));
    }
}

#[test]
fn random_checkpoints_load_as_the_reference_reads_them() {
    let mut dice = Dice::printed();
    for round in 0..60 {
        let folder = Folder::on_disk();
        let shards = random_shards(&mut dice);
        let paths = folder.checkpoint(&shards);
        let mut expected = reference(&paths);
        let keep = 1 + dice.below(4);
        let kept = expected
            .keys()
            .filter(|name| (name.len() as u64).is_multiple_of(keep))
            .cloned()
            .collect::<Vec<_>>();
        expected.retain(|name, _| kept.contains(name));
        let way = dice.pick(&every_way());
        let options = way
            .options()
            .request(Request::of(Select::Names(kept)))
            .handover(dice.pick(&[Handover::Auto, Handover::Private]))
            .threads(1 + dice.below(6) as u32);
        let model = Model::open(folder.path()).unwrap();
        if dice.below(2) == 0 {
            paths.iter().for_each(|path| _ = evict(path));
        }
        let context = format!("round {round}: {options:?}, {shards:?}");
        let loaded = model.load(&options).unwrap_or_else(|error| panic!("{context}: {error:?}"));
        assert_same(loaded.tensors.iter(), &expected, &context);
        assert_consistent(&loaded.report, way.staging_bytes, &context);
    }
}

fn random_shards(dice: &mut Dice) -> Vec<Shard> {
    let names = ["a.safetensors", "b.safetensors", "c.safetensors"];
    let mut number = 0;
    let mut shard = |name| {
        let tensors = (0..dice.below(12)).map(|_| {
            number += 1;
            let dtype = dice.pick(&Dtype::ALL);
            let shape: Vec<u64> =
                (0..dice.below(4)).map(|_| dice.pick(&[0, 1, 2, 3, 8, 8, 33, 64, 129])).collect();
            let shape = if dtype.len_bytes(shape.iter().product()).is_some() { shape } else { vec![8, 2] };
            stored(&format!("layers.{}.{}", number % 3, "w".repeat(number)), dtype, &shape)
        });
        (name, tensors.collect(), dice.below(4096))
    };
    let mut shards: Vec<Shard> = names.map(&mut shard).into();
    shards.retain(|(_, tensors, _)| !tensors.is_empty());
    if shards.is_empty() {
        shards.push((names[0], vec![stored("layers.0.only", Dtype::F32, &[2])], 1));
    }
    shards
}

/// What decides how a private load goes.
#[derive(Clone, Copy, Debug)]
struct Way {
    engine: EngineChoice,
    in_place: Preference,
    staging_bytes: u64,
}

fn every_way() -> Vec<Way> {
    let mut ways = Vec::new();
    for engine in ENGINES {
        for in_place in [Preference::Preferred, Preference::Off] {
            ways.extend(STAGING_BYTES.map(|staging_bytes| Way { engine, in_place, staging_bytes }));
        }
    }
    ways
}

impl Way {
    fn options(self) -> LoadOptions {
        let options = LoadOptions::default().handover(Handover::Private).engine(self.engine);
        options.in_place(self.in_place).staging_bytes(self.staging_bytes)
    }

    /// Checks the report of a load of [`awkward`] files.
    fn assert_figures(self, report: &Report, cache: Cache) {
        let is_cold = cache == Cache::Cold;
        let context = format!("{cache:?}, {self:?}: {report:?}");
        assert_consistent(report, self.staging_bytes, &context);
        assert_eq!((report.handover, report.device.as_str()), ("private", "host"), "{context}");
        assert_eq!(report.bytes_in_place > 0, self.in_place == Preference::Preferred, "{context}");
        assert!(report.peak_staging_bytes > 0, "misaligned tensors are staged: {context}");
        if report.fallbacks.is_empty() {
            assert_eq!(if is_cold { report.bytes_hot } else { report.bytes_cold }, 0, "{context}");
            let direct_bytes =
                if is_cold && self.engine != EngineChoice::Mmap { report.promised.read_bytes } else { 0 };
            assert_eq!(report.bytes_direct, direct_bytes, "{context}");
            assert_eq!(report.engine, self.engine_name(cache), "{context}");
        }
    }

    fn engine_name(self, cache: Cache) -> &'static str {
        match self.engine {
            EngineChoice::Auto if cache == Cache::Cold => "io-uring",
            EngineChoice::Mmap => "mmap",
            EngineChoice::IoUring => "io-uring",
            _ => "pread",
        }
    }
}

const ENGINES: [EngineChoice; 4] =
    [EngineChoice::Auto, EngineChoice::Mmap, EngineChoice::Pread, EngineChoice::IoUring];

const STAGING_BYTES: [u64; 4] = [4096, 64 << 10, 1 << 20, 256 << 20];

const HALF_HOT_LEN_BYTES: u64 = 16 << 20;

/// A read that the middle or the header's page touches may count as either; none is longer than 64 KiB here.
const HALF_HOT_SLACK_BYTES: u64 = 256 << 10;
