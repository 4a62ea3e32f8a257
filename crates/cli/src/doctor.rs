//! `tensorhaul doctor`: what this machine gives a loader.

use std::fmt::Write as _;

use clap::Args;
use tensorhaul::doctor::{Doctor, Feature, Folder};

use crate::failure::Outcome;
use crate::output::{bytes, print, print_json, printable};

/// Show what this machine can do, what is in the way, and what to do about it
#[derive(Args)]
#[command(after_help = "Examples:
  tensorhaul doctor
  tensorhaul doctor --json | jq .advice")]
pub(crate) struct Examine {
    /// Print one JSON object: kernel, cores, memory, io_uring, limits, folders, devices, advice
    #[arg(long)]
    json: bool,
}

impl Examine {
    pub(crate) fn run(&self) -> Outcome {
        let doctor = Doctor::examine();
        if self.json { print_json(&doctor) } else { print(text(&doctor)) }
    }
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
    line("cachestat", feature(&doctor.cachestat));
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
    for device in &doctor.devices {
        line("device", format!("{}: {}", device.name, device.why.unwrap_or("works")));
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

fn folder(folder: &Folder) -> String {
    let filesystem = folder.filesystem.map(|name| format!(" on {name}")).unwrap_or_default();
    let direct = match (folder.direct_align_bytes, &folder.why) {
        (Some(align), _) => format!("direct reads work, aligned to {}", bytes_exactly(align)),
        (None, Some(why)) => format!("no direct reads: {why}"),
        (None, None) => "no direct reads".to_owned(),
    };
    format!("{} ({}){filesystem}: {direct}", folder.path, folder.role)
}

/// Powers of two lose their look in units of 1000.
fn bytes_exactly(len: u64) -> String {
    match len {
        _ if len >= 1 << 20 && len.is_multiple_of(1 << 20) => format!("{} MiB", len >> 20),
        _ if len >= 1 << 10 && len.is_multiple_of(1 << 10) => format!("{} KiB", len >> 10),
        _ => format!("{len} bytes"),
    }
}
