//! Systems that are made up, in a folder, and what is said of them.

use std::fs;
use std::os::unix::fs::symlink;

use clap::Parser as _;
use coiommu_vfio::type1::OpenError;
use coiommu_vfio::{Limits, type1::Memlock};
use tempfile::TempDir;

use super::check::{Check, Verdict};
use super::report::Report;
use super::system::System;
use super::{Args, examine};

/// A host in a folder; one that can do it, until somebody takes something away.
struct Host {
    root: TempDir,
    page_size: u64,
    memlock: Memlock,
    open: fn(&str) -> Result<Limits, OpenError>,
}

const ENTRY_LIMIT: &str = "sys/module/vfio_iommu_type1/parameters/dma_entry_limit";
const NIC: &str = "0000:03:00.0";

fn opens(_address: &str) -> Result<Limits, OpenError> {
    Ok(Limits { page_sizes: 0x1000, iova_ranges: vec![0..=u64::MAX], mappings_left: Some(65_535) })
}

impl Host {
    fn new() -> Self {
        let host = Self {
            root: tempfile::tempdir().unwrap(),
            page_size: 0x1000,
            memlock: Memlock { soft: Some(8 << 20), hard: Some(8 << 20), locked: 0, is_exempt: true },
            open: opens,
        };
        host.write("proc/sys/kernel/osrelease", "6.12.95+deb13-amd64\n");
        host.write("proc/interrupts", "  CPU0\n 24:  7  IR-PCI-MSIX-0000:03:00.0  0-edge  nvme0q0\n");
        host.write("proc/cmdline", "root=/dev/sda1 quiet\n");
        host.write("proc/meminfo", "MemTotal:  33554432 kB\nMemAvailable:  16777216 kB\n");
        host.write("sys/class/iommu/dmar0/cap", "");
        host.write("sys/module/vfio_pci/refcnt", "0\n");
        host.write(ENTRY_LIMIT, "65535\n");
        host.write("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "N\n");
        host.write("dev/vfio/vfio", "");
        host.device(NIC, Some(7), Some("vfio-pci"));
        host
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn remove(&self, path: &str) {
        let path = self.root.path().join(path);
        if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
    }

    fn device(&self, address: &str, group: Option<u32>, driver: Option<&str>) {
        let path = self.root.path().join("sys/bus/pci/devices").join(address);
        if path.exists() {
            fs::remove_dir_all(&path).unwrap();
        }
        fs::create_dir_all(&path).unwrap();
        for (file, text) in [("vendor", "0x8086\n"), ("device", "0x10d3\n"), ("class", "0x020000\n")] {
            fs::write(path.join(file), text).unwrap();
        }
        if let Some(group) = group {
            let group = self.root.path().join("sys/kernel/iommu_groups").join(group.to_string());
            fs::create_dir_all(group.join("devices")).unwrap();
            symlink(&group, path.join("iommu_group")).unwrap();
            // It may be there from before.
            let _ = symlink(&path, group.join("devices").join(address));
        }
        if let Some(driver) = driver {
            symlink(self.root.path().join("sys/bus/pci/drivers").join(driver), path.join("driver")).unwrap();
        }
    }

    /// What `coiommu doctor` says with some arguments, but for QEMU.
    fn checks(&self, args: &[&str]) -> Vec<Check> {
        #[derive(clap::Parser)]
        struct Program {
            #[command(flatten)]
            args: Args,
        }
        let args = Program::try_parse_from(["doctor"].iter().chain(args)).unwrap().args;
        let (open, memlock) = (self.open, self.memlock);
        examine(&System { root: self.root.path(), page_size: self.page_size, memlock, user: 1000, open: &open }, &args)
    }

    /// The one check of that name.
    #[track_caller]
    fn check(&self, name: &str, args: &[&str]) -> Check {
        let mut found: Vec<_> = self.checks(args).into_iter().filter(|check| check.name == name).collect();
        assert_eq!(found.len(), 1, "{name}: {found:?}");
        found.remove(0)
    }
}

/// What a check says, with words that are in what it saw, and in its remedy.
#[track_caller]
fn assert_says(check: &Check, verdict: Verdict, seen: &str, remedy: &str) {
    assert_eq!(check.verdict, verdict, "{check:?}");
    assert!(check.seen.contains(seen), "{seen:?} is not in {check:?}");
    assert!(check.remedy.as_deref().unwrap_or_default().contains(remedy), "{remedy:?} is not in {check:?}");
    let needs_one = matches!(verdict, Verdict::Warning | Verdict::Failed);
    assert_eq!(check.remedy.is_some(), needs_one, "{check:?}");
}

const NIC_AND_4G: [&str; 4] = ["--host", "03:00.0", "--memory", "4g"];

#[test]
fn on_a_good_host_all_is_well() {
    let checks = Host::new().checks(&NIC_AND_4G);
    let shown: Vec<_> = checks.iter().map(|check| (check.name, check.device.as_deref(), check.verdict)).collect();
    let of_host = |name| (name, None, Verdict::Ok);
    let of_nic = |name| (name, Some(NIC), Verdict::Ok);
    let wanted = [
        of_host("kernel"),
        of_host("page-size"),
        of_host("iommu"),
        of_host("interrupts"),
        of_host("vfio"),
        of_nic("device"),
        of_nic("group"),
        of_nic("driver"),
        of_nic("open"),
        of_host("memlock"),
        of_host("mappings"),
        of_host("pin-all"),
    ];
    assert_eq!(shown, wanted);
    let report = Report::new(checks);
    assert!(!report.has_failed());
    assert!(report.text(false).ends_with("\n12 ok: this host can do it\n"), "{}", report.text(false));
}

#[test]
fn an_old_kernel_is_warned_of() {
    for (release, verdict, seen, remedy) in [
        ("5.10.0-30-amd64", Verdict::Warning, "in one call", "5.12"),
        ("6.1.0-28-amd64", Verdict::Warning, "MSI-X", "6.5"),
        ("6.5.0", Verdict::Ok, "Linux 6.5.0", ""),
        ("10.0-rc1", Verdict::Ok, "Linux 10.0-rc1", ""),
        ("strange", Verdict::Unknown, "strange", ""),
    ] {
        let host = Host::new();
        host.write("proc/sys/kernel/osrelease", release);
        assert_says(&host.check("kernel", &[]), verdict, seen, remedy);
    }
}

#[test]
fn pages_have_to_be_the_guest_s() {
    let host = Host { page_size: 0x1_0000, ..Host::new() };
    assert_says(&host.check("page-size", &[]), Verdict::Failed, "65,536 bytes", "4,096");
}

#[test]
fn without_an_iommu_the_remedy_is_the_machine_s() {
    let host = Host::new();
    assert_says(&host.check("iommu", &[]), Verdict::Ok, "dmar0; groups of devices: 1", "");
    host.write("sys/kernel/iommu_groups/7/name", "vfio-noiommu\n");
    assert_says(&host.check("iommu", &[]), Verdict::Failed, "none", "in the firmware: VT-d, AMD-Vi, SMMU");
    assert_says(&host.check("interrupts", &[]), Verdict::Unknown, "no IOMMU is on", "");
    host.write("proc/cpuinfo", "flags\t\t: fpu hypervisor sse\n");
    assert_says(&host.check("iommu", &[]), Verdict::Failed, "virtual machine", "intel-iommu,intremap=on");
    host.write("sys/firmware/acpi/tables/IVRS", "");
    assert_says(&host.check("iommu", &[]), Verdict::Failed, "IVRS", "dmesg");
    host.write("sys/firmware/acpi/tables/DMAR", "");
    assert_says(&host.check("iommu", &[]), Verdict::Failed, "DMAR", "add intel_iommu=on");
    host.write("proc/cmdline", "quiet intel_iommu=off\n");
    assert_says(&host.check("iommu", &[]), Verdict::Failed, "intel_iommu=off", "remove intel_iommu=off");
}

#[test]
fn interrupts_have_to_be_remapped_or_accepted() {
    let host = Host::new();
    assert_says(&host.check("interrupts", &[]), Verdict::Ok, "remapped", "");
    host.write("proc/interrupts", " 24:  7  PCI-MSIX-0000:03:00.0  0-edge  nvme0q0\n");
    let check = host.check("interrupts", &[]);
    assert_says(&check, Verdict::Failed, "not remapped", "intremap=off");
    assert_eq!(check.commands, ["echo 1 > /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"]);
    host.write("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y\n");
    assert_says(&host.check("interrupts", &[]), Verdict::Warning, "accepted", "trust the guests");
    host.write("proc/interrupts", " 24:  7  ITS-MSI  0 Edge  nvme0q0\n");
    assert_says(&host.check("interrupts", &[]), Verdict::Unknown, "does not tell", "");
}

#[test]
fn vfio_has_to_be_loaded_and_its_file_there() {
    let host = Host::new();
    host.remove("dev/vfio/vfio");
    assert_says(&host.check("vfio", &[]), Verdict::Failed, "/dev/vfio/vfio is not there", "in a container");
    host.remove("sys/module/vfio_pci");
    let check = host.check("vfio", &[]);
    assert_says(&check, Verdict::Failed, "not loaded: vfio-pci", "built without VFIO");
    assert_eq!(check.commands, ["modprobe -a vfio-pci"]);
    host.remove("sys/module/vfio_iommu_type1");
    assert_eq!(host.check("vfio", &[]).commands, ["modprobe -a vfio-pci vfio_iommu_type1"]);
    host.write("sys/module/vfio_pci_core/refcnt", "");
    assert_eq!(host.check("vfio", &[]).commands, ["modprobe -a vfio_iommu_type1"]);
}

#[test]
fn devices_that_are_bound_are_named_up_to_a_number() {
    let host = Host::new();
    host.device("0000:04:00.0", Some(8), Some("nvme"));
    assert_says(&host.check("devices", &[]), Verdict::Ok, "1 bound to vfio-pci: 0000:03:00.0 (8086:10d3, group 7)", "");
    for function in 0..20 {
        host.device(&format!("0000:05:{function:02x}.0"), Some(20 + function), Some("vfio-pci"));
    }
    let check = host.check("devices", &[]);
    assert_says(&check, Verdict::Ok, "21 bound", "");
    assert!(check.seen.ends_with("0000:05:0e.0 (8086:10d3, group 34), and more"), "{check:?}");
    assert!(Host::new().checks(&["--host", NIC]).iter().all(|check| check.name != "devices"));
    let host = Host::new();
    host.device(NIC, Some(7), None);
    assert_says(&host.check("devices", &[]), Verdict::Ok, "none is bound", "");
}

#[test]
fn a_device_that_is_not_there_is_looked_at_no_further() {
    let checks = Host::new().checks(&["--host", "09:00.0"]);
    let of_device: Vec<_> = checks.iter().filter(|check| check.device.is_some()).collect();
    assert_eq!(of_device.len(), 1);
    assert_says(of_device[0], Verdict::Failed, "there is no PCI device 0000:09:00.0", "lspci");
}

#[test]
fn a_bridge_is_no_device() {
    let host = Host::new();
    host.write(&format!("sys/bus/pci/devices/{NIC}/class"), "0x060400\n");
    assert_says(&host.check("device", &["--host", NIC]), Verdict::Failed, "a bridge", "behind it");
    let names: Vec<_> = host.checks(&["--host", NIC]).iter().map(|check| check.name).collect();
    assert!(!names.contains(&"driver"), "nobody is told how to bind it: {names:?}");
}

#[test]
fn a_device_is_named_once_however_often_it_was_asked_for() {
    assert_eq!(Host::new().check("driver", &["--host", NIC, "--host", "03:00.0"]).seen, "vfio-pci");
}

#[test]
fn a_device_that_is_not_bound_is_not_opened() {
    let host = Host { open: |_| panic!("it is driven by somebody"), ..Host::new() };
    host.device(NIC, Some(7), Some("nvme"));
    let check = host.check("driver", &["--host", NIC]);
    assert_says(&check, Verdict::Failed, "is driven by nvme, not by vfio-pci", "give it to vfio-pci");
    let bind = [
        "echo vfio-pci > /sys/bus/pci/devices/0000:03:00.0/driver_override",
        "echo 0000:03:00.0 > /sys/bus/pci/devices/0000:03:00.0/driver/unbind",
        "echo 0000:03:00.0 > /sys/bus/pci/drivers_probe",
    ];
    assert_eq!(check.commands, bind);
    assert_says(&host.check("open", &["--host", NIC]), Verdict::Unknown, "driver has failed", "");

    host.device(NIC, Some(7), None);
    host.remove("sys/module/vfio_pci");
    let check = host.check("driver", &["--host", NIC]);
    assert_eq!(check.commands, ["modprobe vfio-pci", bind[0], bind[2]], "there is nothing to unbind it from");
}

#[test]
fn neighbours_are_named_and_those_in_the_way_moved() {
    let host = Host { open: |_| panic!("its group cannot be used"), ..Host::new() };
    host.device("0000:03:00.1", Some(7), Some("snd_hda_intel"));
    host.device("0000:00:1c.0", Some(7), Some("pcieport"));
    let check = host.check("group", &["--host", NIC]);
    let seen = "7, with 0000:00:1c.0 (pcieport), 0000:03:00.1 (snd_hda_intel); of these, the host uses 0000:03:00.1 \
                (snd_hda_intel)";
    assert_says(&check, Verdict::Failed, seen, "another slot");
    assert_eq!(check.commands.len(), 3);
    assert_eq!(check.commands[1], "echo 0000:03:00.1 > /sys/bus/pci/devices/0000:03:00.1/driver/unbind");
    let host = Host { open: opens, ..host };
    host.device("0000:03:00.1", Some(7), Some("vfio-pci"));
    let check = host.check("group", &["--host", NIC]);
    assert_says(&check, Verdict::Ok, "7, with 0000:00:1c.0 (pcieport), 0000:03:00.1 (vfio-pci)", "");
    assert_says(&host.check("open", &["--host", NIC]), Verdict::Ok, "opened", "");
}

#[test]
fn memory_that_the_firmware_keeps_is_warned_of() {
    let host = Host::new();
    let regions = "0x000000007b800000 0x000000007b8fffff direct-relaxable\n0x00000000fee00000 0x00000000feefffff msi\n";
    host.write("sys/kernel/iommu_groups/7/reserved_regions", regions);
    assert_says(&host.check("group", &["--host", NIC]), Verdict::Ok, "7, alone", "");
    let locked = "0x000000008b800000 0x000000008b8fffff direct\n";
    host.write("sys/kernel/iommu_groups/7/reserved_regions", &format!("{regions}{locked}"));
    let check = host.check("group", &["--host", NIC]);
    assert_says(&check, Verdict::Warning, "(RMRR): 0x000000008b800000 to 0x000000008b8fffff", "that is why");
    assert!(!check.seen.contains("7b800000"), "{check:?}");
}

#[test]
fn a_device_without_an_iommu_is_told_from_others() {
    let host = Host { open: |_| panic!("no group"), ..Host::new() };
    host.device("0000:04:00.0", None, Some("vfio-pci"));
    let check = host.check("group", &["--host", "04:00.0"]);
    assert_says(&check, Verdict::Failed, "0000:04:00.0 is behind no IOMMU", "firmware");
    let names: Vec<_> = host.checks(&["--host", "04:00.0"]).iter().map(|check| check.name).collect();
    assert!(!names.contains(&"driver"), "it cannot be bound: {names:?}");
}

#[test]
fn a_device_that_cannot_be_opened_says_why() {
    let opened = |open| Host { open, ..Host::new() }.check("open", &["--host", NIC]);
    let check = opened(|address| {
        assert_eq!(address, NIC);
        Err(OpenError::Permission { path: "/dev/vfio/7".to_owned() })
    });
    assert_says(&check, Verdict::Failed, "/dev/vfio/7 may not be opened", "be root");
    assert_eq!(check.commands, ["chown 1000 /dev/vfio/7"]);
    let check = opened(|address| {
        let (device, holders) = (address.to_owned(), vec!["812 (qemu)".to_owned()]);
        Err(OpenError::Busy { device, group: 7, holders, suspects: Vec::new() })
    });
    assert_says(&check, Verdict::Failed, "in use by process 812 (qemu)", "wait until it ends, or end it");
    let check = opened(|address| Err(OpenError::Device { device: address.to_owned(), message: "no idea".to_owned() }));
    assert_says(&check, Verdict::Failed, "no idea", "dmesg");
    assert_eq!(check.device.as_deref(), Some(NIC));
    // Of errors that nobody has a remedy for, the cause is seen.
    let check = opened(|_| {
        let source = std::io::Error::from_raw_os_error(5);
        Err(OpenError::System { what: "ask the container for its limits", source })
    });
    assert_eq!((check.verdict, check.remedy), (Verdict::Failed, None));
    assert!(check.seen.starts_with("cannot ask the container for its limits: Input/output error"), "{}", check.seen);
}

#[test]
fn what_may_be_locked_is_compared_with_what_is_pinned() {
    let mut host = Host::new();
    assert_says(&host.check("memlock", &[]), Verdict::Ok, "CAP_IPC_LOCK", "");
    host.memlock.is_exempt = false;
    assert_says(&host.check("memlock", &[]), Verdict::Warning, "8.0 MiB", "LimitMEMLOCK");
    assert_says(&host.check("memlock", &["--memory", "8m"]), Verdict::Ok, "8.0 MiB are pinned", "");
    let check = host.check("memlock", &["--memory", "9m"]);
    assert_says(&check, Verdict::Failed, "up to 9.0 MiB are pinned", "quota=SIZE");
    let check = host.check("memlock", &["--memory", "9m", "--policy", "quota=8m"]);
    assert_says(&check, Verdict::Ok, "up to 8.0 MiB are pinned", "");
    host.memlock.hard = None;
    assert_says(&host.check("memlock", &["--memory", "9m"]), Verdict::Ok, "unlimited", "");
}

#[test]
fn mappings_are_counted_from_the_best_source_there_is() {
    let mut host = Host::new();
    let four_gib = ["--memory", "4g", "--policy", "extent=page"];
    host.write(ENTRY_LIMIT, "4096\n");
    assert_says(&host.check("mappings", &[]), Verdict::Ok, "4,096 (dma_entry_limit of vfio_iommu_type1): 8.0 GiB", "");
    assert_says(&host.check("mappings", &four_gib), Verdict::Ok, "4,096 are needed at least", "");
    host.write(ENTRY_LIMIT, "4095\n");
    let check = host.check("mappings", &four_gib);
    assert_says(&check, Verdict::Failed, "4,095 (dma_entry_limit of vfio_iommu_type1), and 4,096", "coarser extent");
    assert_eq!(check.commands, ["echo 4096 > /sys/module/vfio_iommu_type1/parameters/dma_entry_limit"]);
    // A container knows better.
    assert_says(&host.check("mappings", &["--host", NIC]), Verdict::Ok, "65,535 (dma_avail of a container)", "");
    host.open = |_| Ok(Limits { mappings_left: None, ..opens("")? });
    assert_says(&host.check("mappings", &["--host", NIC]), Verdict::Ok, "does not count", "");
    host.remove("sys/module/vfio_iommu_type1");
    assert_says(&host.check("mappings", &[]), Verdict::Unknown, "65,535 by default", "");
}

#[test]
fn all_of_the_ram_can_be_pinned_or_not() {
    let mut host = Host::new();
    let check = host.check("pin-all", &["--memory", "4g"]);
    assert_says(&check, Verdict::Ok, "all RAM is 4.0 GiB in 2,048 mappings of 2 MiB", "");
    let quota = host.check("pin-all", &["--memory", "4g", "--policy", "quota=1g"]);
    assert_says(&quota, Verdict::Warning, "against that: the quota is 1.0 GiB", "--without-driver hold");
    assert_says(
        &host.check("pin-all", &["--memory", "17g"]),
        Verdict::Warning,
        "the host has 16.0 GiB to spare",
        "hold",
    );
    host.write(ENTRY_LIMIT, "2047\n");
    assert_says(&host.check("pin-all", &["--memory", "4g"]), Verdict::Warning, "there are 2,047 mappings", "hold");
    host.memlock.is_exempt = false;
    assert_says(&host.check("pin-all", &["--memory", "4g"]), Verdict::Warning, "this process may lock 8.0 MiB", "hold");
    assert!(Report::new(vec![quota]).text(false).ends_with("\n1 warning: this host can do it\n"));
}

#[test]
fn lines_are_aligned_and_remedies_below() {
    let host = Host::new();
    host.write("proc/interrupts", "IO-APIC");
    let report = Report::new(host.checks(&["--host", NIC]));
    let text = report.text(false);
    let start = "ok       kernel               Linux 6.12.95+deb13-amd64\n\
                 ok       page-size            4,096 bytes\n\
                 ok       iommu                dmar0; groups of devices: 1\n\
                 failed   interrupts           not remapped: VFIO takes no device, as it could forge some\n    switch ";
    assert!(text.starts_with(start), "{text}");
    assert!(text.contains(" accept it:\n        echo 1 > /sys/"), "{text}");
    assert!(text.contains("\nok       0000:03:00.0 driver  vfio-pci\n"), "{text}");
    assert!(text.ends_with("\n10 ok, 1 failed: this host cannot do it yet\n"), "{text}");
    assert!(report.has_failed());
    let coloured = report.text(true);
    assert!(coloured.contains("\u{1b}[38;5;1mfailed ") && !text.contains('\u{1b}'), "{coloured:?}");
}
