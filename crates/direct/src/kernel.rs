//! What the kernel says of its part in direct storage: facts for messages and for what a library is told, never a verdict.

use std::fs;
use std::path::Path;

use crate::vendor::Vendor;

/// What of the kernel lets storage write into a device's memory.
///
/// Either may be enough, and neither may be visible from a container: whether direct storage works is found out by using it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kernel {
    /// The version of the module nvidia-fs, if it is loaded; empty where it does not tell.
    pub nvidia_fs: Option<String>,
    /// Whether the kernel was built with `CONFIG_PCI_P2PDMA`; `None` where its configuration cannot be read.
    pub p2pdma: Option<bool>,
}

impl Kernel {
    /// Asks the kernel of this machine.
    pub fn examine() -> Kernel {
        Kernel::at(Path::new("/"))
    }

    fn at(root: &Path) -> Kernel {
        let read = |path: &str| fs::read_to_string(root.join(path)).ok();
        let modules = read("proc/modules").unwrap_or_default();
        let is_loaded = modules.lines().any(|line| line.split(' ').next() == Some("nvidia_fs"));
        let version = read("proc/driver/nvidia-fs/version");
        let nvidia_fs = (is_loaded || version.is_some()).then(|| {
            version.as_deref().and_then(|text| text.split_whitespace().last()).unwrap_or("").to_owned()
        });
        let release = read("proc/sys/kernel/osrelease").unwrap_or_default();
        let release = release.trim();
        let configuration = read(&format!("boot/config-{release}"))
            .or_else(|| read(&format!("lib/modules/{release}/config")));
        let p2pdma = configuration.map(|text| text.lines().any(|line| line == "CONFIG_PCI_P2PDMA=y"));
        Kernel { nvidia_fs, p2pdma }
    }

    /// Says what matters to a vendor's library.
    pub fn tell(&self, vendor: Vendor) -> String {
        let module = match (vendor, self.nvidia_fs.as_deref()) {
            (Vendor::Amd, _) => None,
            (Vendor::Nvidia, None) => Some("nvidia-fs is not loaded".to_owned()),
            (Vendor::Nvidia, Some("")) => Some("nvidia-fs is loaded".to_owned()),
            (Vendor::Nvidia, Some(version)) => Some(format!("nvidia-fs {version} is loaded")),
        };
        let p2pdma = match self.p2pdma {
            None => "whether the kernel has P2PDMA cannot be seen",
            Some(true) => "the kernel has P2PDMA",
            Some(false) => "the kernel has no P2PDMA",
        };
        module.into_iter().chain([p2pdma.to_owned()]).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed expectation is the test's own report")]
mod tests {
    use super::*;

    #[test]
    fn modules_and_configuration_are_read() {
        let root = std::env::temp_dir().join(format!("tensorhaul-kernel-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let kernel = Kernel::at(&root);
        assert_eq!(kernel, Kernel::default());
        let unseen = "nvidia-fs is not loaded, whether the kernel has P2PDMA cannot be seen";
        assert_eq!(kernel.tell(Vendor::Nvidia), unseen);
        write("proc/modules", "ext4 1 2 - Live 0x0\nnvidia_fs 262144 0 - Live 0x0\n");
        write("proc/sys/kernel/osrelease", "6.8.0-test\n");
        write("boot/config-6.8.0-test", "CONFIG_PCI=y\n# CONFIG_PCI_P2PDMA is not set\n");
        let kernel = Kernel::at(&root);
        assert_eq!(kernel.tell(Vendor::Nvidia), "nvidia-fs is loaded, the kernel has no P2PDMA");
        assert_eq!(kernel.tell(Vendor::Amd), "the kernel has no P2PDMA");
        write("proc/driver/nvidia-fs/version", "version: 2.17\n");
        write("boot/config-6.8.0-test", "CONFIG_PCI_P2PDMA=y\n");
        let kernel = Kernel::at(&root);
        assert_eq!(kernel.tell(Vendor::Nvidia), "nvidia-fs 2.17 is loaded, the kernel has P2PDMA");
        fs::remove_dir_all(root).unwrap();
    }
}
