//! `tensorhaul doctor`: what this machine gives a loader.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use tensorhaul::doctor::{
    CopySpeed, DeviceFact, DirectFolder, DirectStorageFact, Doctor, DriverFact, Feature, Folder, KernelFact,
    PciPlace, PeerFact,
};
use tensorhaul::selftest::{self, Verdict};

use crate::arguments::{Device, parse_device};
use crate::failure::{Failure, Outcome};
use crate::output::{bytes, print, print_json, printable};

/// Show what this machine can do, what is in the way, and what to do about it
#[derive(Args)]
#[command(after_help = "Examples:
  tensorhaul doctor
  tensorhaul doctor /models /mnt/nfs/models       can files there be read directly?
  tensorhaul doctor --selftest
  tensorhaul doctor --selftest --device cuda:0 --json
  tensorhaul doctor --json | jq .advice")]
pub(crate) struct Examine {
    /// Folders or files that checkpoints are read from [default: the current folder and the Hugging Face cache]
    paths: Vec<PathBuf>,

    /// Try every device: the conformance suite, a load compared byte for byte, and the speed of copies. Exits with 3 if
    /// one fails
    #[arg(long)]
    selftest: bool,

    /// Try only this device
    #[arg(long, value_name = "host|cuda:N|rocm:N|auto", requires = "selftest", value_parser = parse_device)]
    device: Option<Device>,

    /// Print one JSON object: kernel, cores, memory, io_uring, limits, folders, drivers, devices, peers,
    /// direct_storage, advice
    #[arg(long)]
    json: bool,
}

impl Examine {
    pub(crate) fn run(&self) -> Outcome {
        let doctor = match self.paths.as_slice() {
            [] => Doctor::examine(),
            paths => Doctor::examine_paths(paths)?,
        };
        if self.selftest {
            return self.try_devices(&doctor);
        }
        if self.json { print_json(&doctor) } else { print(text(&doctor)) }
    }

    fn try_devices(&self, doctor: &Doctor) -> Outcome {
        // What is there and does not work fails; a kind of device of which there is none has no number.
        let is_there = |device: &&DeviceFact| device.works || device.name.contains(':');
        let all = || doctor.devices.iter().filter(is_there).filter_map(|device| device.name.parse().ok());
        let devices = self.device.map_or_else(
            || all().collect(),
            |device| vec![device.named().unwrap_or_else(tensorhaul::default_device)],
        );
        let verdicts: Vec<_> = devices
            .iter()
            .map(|device| selftest::run(*device, &std::env::temp_dir()))
            .collect::<Result<_, _>>()?;
        if self.json {
            print_json(&Tried { devices: &doctor.devices, verdicts: &verdicts })?;
        } else {
            print(verdicts.iter().map(verdict).collect::<String>())?;
        }
        match verdicts.iter().filter(|verdict| !verdict.passed).count() {
            0 => Ok(()),
            failed => Err(Failure::of_machine(format!("{failed} of {} devices failed", verdicts.len()))),
        }
    }
}

/// What `--selftest --json` prints.
#[derive(Serialize)]
struct Tried<'d> {
    devices: &'d [DeviceFact],
    verdicts: &'d [Verdict],
}

fn verdict(verdict: &Verdict) -> String {
    let Verdict { device, name, promises, copy_gb_per_s, .. } = verdict;
    let word = if verdict.passed { "passed" } else { "FAILED" };
    let compared = bytes(verdict.compared_bytes);
    let mut text = format!(
        "{device}: {word}: {name}, {promises} promises, {compared} compared, copies {copy_gb_per_s:.1} GB/s\n"
    );
    for failure in &verdict.failures {
        let _ = writeln!(text, "  {}", printable(failure));
    }
    text
}

fn text(doctor: &Doctor) -> String {
    let mut text = String::new();
    let mut line = |title: &str, fact: String| {
        let _ = writeln!(text, "{title:<14}{}", printable(&fact));
    };
    line("tensorhaul", doctor.version.to_owned());
    line("kernel", doctor.kernel.clone());
    line("cores", doctor.cores.to_string());
    line("memory", memory(doctor));
    line(
        "pages",
        format!(
            "{}, huge pages: {}",
            bytes_exactly(doctor.page_bytes),
            doctor.huge_pages.as_deref().unwrap_or("none")
        ),
    );
    line("io_uring", feature(&doctor.io_uring));
    line("registering", feature(&doctor.registered_buffers));
    line("page cache", page_cache(&doctor.cachestat));
    line(
        "locked memory",
        doctor
            .locked_memory_limit_bytes
            .map_or("no limit".to_owned(), |limit| format!("at most {}", bytes_exactly(limit))),
    );
    line(
        "open files",
        doctor.open_files_limit.map_or("no limit".to_owned(), |limit| format!("at most {limit}")),
    );
    for folder in &doctor.folders {
        line("folder", self::folder(folder));
    }
    for driver in &doctor.drivers {
        line("driver", format!("{}: {}", driver.name, self::driver(driver)));
    }
    for device in &doctor.devices {
        let told = doctor.drivers.iter().any(|driver| driver.why.is_some() && driver.why == device.why);
        let fact = if told { "does not work without its driver".to_owned() } else { self::device(device) };
        line("device", format!("{}: {fact}", device.name));
    }
    for (number, row) in peers(&doctor.peers).into_iter().enumerate() {
        line(if number == 0 { "peers" } else { "" }, row);
    }
    for (devices, storage) in alike(&doctor.direct_storage) {
        line("storage", format!("into {}: {}", devices.join(", "), self::storage(&storage)));
        if let Some(remedy) = &storage.remedy {
            line("", format!("-> {remedy}"));
        }
        for folder in &storage.folders {
            line("storage", direct_folder(folder));
        }
    }
    if doctor.advice.is_empty() {
        line("advice", "none: nothing is missing".to_owned());
    }
    for advice in &doctor.advice {
        line("advice", advice.what.clone());
        line("", format!("-> {}", advice.remedy));
    }
    text
}

fn memory(doctor: &Doctor) -> String {
    let mut text = bytes(doctor.memory_bytes);
    if let Some(available) = doctor.memory_available_bytes {
        let _ = write!(text, ", {} available", bytes(available));
    }
    if let Some(limit) = doctor.memory_limit_bytes {
        let _ = write!(text, ", limited to {} by the control group", bytes(limit));
    }
    text
}

fn feature(feature: &Feature) -> String {
    match &feature.why {
        None => "works".to_owned(),
        Some(why) => format!("does not work: {why}"),
    }
}

/// How it is decided whether a file is read past the page cache or out of it.
fn page_cache(cachestat: &Feature) -> String {
    match &cachestat.why {
        None => "what it holds is counted, with cachestat".to_owned(),
        Some(why) => format!("what it holds is sampled, with RWF_NOWAIT; cachestat does not work: {why}"),
    }
}

fn driver(driver: &DriverFact) -> String {
    if let Some(why) = &driver.why {
        return format!("{}: {why}", if driver.found { "does not work" } else { "not found" });
    }
    let module = driver.kernel_module.as_ref().map(|version| format!("kernel module {version}"));
    let facts = [driver.library.clone(), driver.version.clone(), module];
    facts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

fn folder(folder: &Folder) -> String {
    let filesystem = folder.filesystem.map(|name| format!(" on {name}")).unwrap_or_default();
    let mount = folder.mount.as_ref().map(|mount| format!(", mounted at {mount}")).unwrap_or_default();
    let direct = match (folder.direct_align_bytes, &folder.why) {
        (Some(align), _) => format!("direct reads work, aligned to {}", bytes_exactly(align)),
        (None, Some(why)) => format!("no direct reads: {why}"),
        (None, None) => "no direct reads".to_owned(),
    };
    format!("{} ({}){filesystem}{mount}: {direct}", folder.path, folder.role)
}

/// What reads straight into a device, past the host.
fn storage(storage: &DirectStorageFact) -> String {
    if !storage.needed {
        return "loads do not need it: reads land in memory that is shared with the host".to_owned();
    }
    if let Some(why) = &storage.why {
        return format!("does not work: {why}");
    }
    let version = storage.version.as_deref().unwrap_or("of unknown version");
    let library = storage.library.as_deref().unwrap_or_default();
    format!("{} {version} ({library}), {}", storage.kind, storage.kernel)
}

/// Tells once what is the same for several devices.
fn alike(facts: &[DirectStorageFact]) -> Vec<(Vec<&str>, DirectStorageFact)> {
    let mut groups: Vec<(Vec<&str>, DirectStorageFact)> = Vec::new();
    for fact in facts {
        let mut nobodys = fact.clone();
        nobodys.device.clear();
        match groups.iter_mut().find(|(_, group)| *group == nobodys) {
            Some((devices, _)) => devices.push(&fact.device),
            None => groups.push((vec![&fact.device], nobodys)),
        }
    }
    groups
}

/// A row for each device: from which others it copies straight, and from which by way of the staging ring; then why.
fn peers(facts: &[PeerFact]) -> Vec<String> {
    let Some(width) = facts.iter().map(|fact| fact.device.len().max("direct".len())).max() else {
        return Vec::new();
    };
    let row = |title: &str, cells: Vec<&str>| {
        let cells: String = cells.iter().map(|cell| format!("  {cell:width$}")).collect();
        format!("{title:>0$}{cells}", width + 3).trim_end().to_owned()
    };
    let mut rows = vec![row("from", facts.iter().map(|fact| &*fact.device).collect())];
    let mut reasons: Vec<&str> = Vec::new();
    for fact in facts {
        let cell = |other: &PeerFact| match fact.from.iter().find(|reach| reach.device == other.device) {
            None => "-",
            Some(reach) if reach.verdict.works => "direct",
            Some(_) => "ring",
        };
        rows.push(row(&format!("to {}", fact.device), facts.iter().map(cell).collect()));
        reasons.extend(fact.from.iter().filter_map(|reach| reach.verdict.why.as_deref()));
    }
    reasons.sort_unstable();
    reasons.dedup();
    rows.extend(reasons.into_iter().map(|why| format!("ring: {why}")));
    rows
}

fn direct_folder(folder: &DirectFolder) -> String {
    let remedy = folder.remedy.as_ref().map(|remedy| format!(" -> {remedy}")).unwrap_or_default();
    format!("from {}: {}{remedy}", folder.path, feature(&folder.verdict))
}

fn device(device: &DeviceFact) -> String {
    if let Some(why) = &device.why {
        return format!("does not work: {why}");
    }
    let memory = device.total_bytes.map(bytes);
    let copies = device.copies.map(|speed| {
        let CopySpeed { to_device_gb_per_s, to_host_gb_per_s } = speed;
        format!("pinned copies {to_device_gb_per_s:.1} GB/s to it, {to_host_gb_per_s:.1} GB/s back")
    });
    let shared = device.shares_memory.then(|| "memory shared with the host".to_owned());
    let near = device.host_node.map(|node| format!("nearest to memory node {node}"));
    let place = device.pci.as_ref().map(PciPlace::to_string);
    let link = device.link.as_ref().map(ToString::to_string);
    let kernels = device.kernels.as_ref().map(kernels);
    let facts = [device.description.clone(), memory, shared, place, near, link, copies, kernels];
    let facts: Vec<_> = facts.into_iter().flatten().collect();
    if facts.is_empty() { "works".to_owned() } else { format!("works: {}", facts.join(", ")) }
}

fn kernels(kernels: &KernelFact) -> String {
    match (kernels.works, &kernels.why) {
        (true, None) => "kernels built in".to_owned(),
        (true, Some(why)) => format!("kernels compiled on this machine ({why})"),
        (false, why) => format!("no kernels ({})", why.as_deref().unwrap_or_default()),
    }
}

/// Powers of two lose their look in units of 1000.
fn bytes_exactly(len: u64) -> String {
    match len {
        _ if len >= 1 << 20 && len.is_multiple_of(1 << 20) => format!("{} MiB", len >> 20),
        _ if len >= 1 << 10 && len.is_multiple_of(1 << 10) => format!("{} KiB", len >> 10),
        _ => format!("{len} bytes"),
    }
}
