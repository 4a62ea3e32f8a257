//! Whether storage reads straight into each device: the library, the kernel's part, each folder.

use std::path::Path;
use std::sync::Arc;

use serde::Serialize;
use tensorhaul_device::Device;
use tensorhaul_direct::{Compatibility, Kernel, Library, Probe, Refusal, Vendor};

use super::folders::{Folder, sample};
use super::{Advice, Feature};

/// Direct storage into one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DirectStorageFact {
    /// The device.
    pub device: String,
    /// Whether loads have a use for it: where the device's memory is the host's, reads land in it anyway, and the library is not opened.
    pub needed: bool,
    /// Whether the library opened, out of compatibility mode.
    pub works: bool,
    /// Whose library it is: `cuFile` or `hipFile`.
    pub kind: &'static str,
    /// The library's name or path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub library: Option<String>,
    /// Its version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// What the kernel says of its part.
    pub kernel: String,
    /// Why it does not work.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// What would help.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// Where checkpoints are read from, each tried with a first page.
    pub folders: Vec<DirectFolder>,
}

/// Direct storage from one folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DirectFolder {
    /// Its path.
    pub path: String,
    /// Whether it works.
    #[serde(flatten)]
    pub verdict: Feature,
    /// What would help.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// Tries every device that works. Nothing is opened where there is none.
pub(super) fn examine(devices: &[Arc<dyn Device>], folders: &[Folder]) -> Vec<DirectStorageFact> {
    let fact = |device| Some(examine_one(device, Vendor::of(Device::id(&**device))?, folders));
    devices.iter().filter_map(fact).collect()
}

fn examine_one(device: &Arc<dyn Device>, vendor: Vendor, folders: &[Folder]) -> DirectStorageFact {
    let mut fact = DirectStorageFact {
        device: device.id().to_string(),
        needed: !device.capabilities().in_place,
        works: false,
        kind: vendor.library(),
        library: None,
        version: None,
        kernel: Kernel::examine().tell(vendor),
        why: None,
        remedy: None,
        folders: Vec::new(),
    };
    if !fact.needed {
        return fact;
    }
    match Library::open(device, Compatibility::Refused) {
        Ok(library) => {
            (fact.works, fact.library, fact.version) = (true, Some(library.path()), library.version());
            fact.folders = folders.iter().map(|folder| try_folder(device, &library, folder)).collect();
        }
        Err(refusal) => (fact.why, fact.remedy) = (Some(refusal.to_string()), refusal.remedy()),
    }
    fact
}

/// What stands in the way of direct storage, once for all devices and folders that share it.
pub(super) fn advise(facts: &[DirectStorageFact]) -> Vec<Advice> {
    let mut advice: Vec<Advice> = Vec::new();
    for fact in facts {
        let whole = fact.remedy.iter().map(|remedy| (fact.kind.to_owned(), &fact.why, remedy));
        let folders = fact.folders.iter().filter_map(|folder| {
            Some((
                format!("{} from {}", fact.kind, folder.path),
                &folder.verdict.why,
                folder.remedy.as_ref()?,
            ))
        });
        for (what, why, remedy) in whole.chain(folders) {
            let why = why.as_deref().unwrap_or_default();
            let what =
                format!("direct storage by {what} does not work ({why}): reads make a stop in host memory");
            let told = Advice { what, remedy: remedy.clone() };
            if !advice.contains(&told) {
                advice.push(told);
            }
        }
    }
    advice
}

fn try_folder(device: &Arc<dyn Device>, library: &Arc<Library>, folder: &Folder) -> DirectFolder {
    let tried = sample(Path::new(&folder.path)).map_err(|why| (why, None)).and_then(|file| {
        let told = |refusal: Refusal| (refusal.to_string(), refusal.remedy());
        let probe = Probe::new(library, device).map_err(told)?;
        probe.try_file(&Arc::from([file]), 0).map(drop).map_err(told)
    });
    let (verdict, remedy) = match tried {
        Ok(()) => (Feature::new(Ok(())), None),
        Err((why, remedy)) => (Feature::new(Err(why)), remedy),
    };
    DirectFolder { path: folder.path.clone(), verdict, remedy }
}
