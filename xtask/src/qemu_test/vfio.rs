//! `cargo xtask qemu-test vfio`: coiommu-vfio on the kernel's VFIO, with an IOMMU, edu, nvme and xHCI.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::ValueEnum;
use serde_json::Value;

use super::judge;
use crate::step;
use crate::vm::{Answer, Choices, Claim, Emulator, FOLDER, Initramfs, Kernel, Machine, harness, machine, tools};

/// Run the hardware tests of coiommu-vfio on a kernel's VFIO, with an IOMMU, edu, nvme and xHCI
///
/// Fails if a test fails, if none ran, if the machine's kernel warns or reports a DMA fault that no test announced, and
/// after the time limit. Debian's kernel is fetched once, with apt, and kept under target/vm: remove
/// target/vm/kernels for a newer one.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  cargo xtask qemu-test vfio                       what the gate runs
  cargo xtask qemu-test vfio --test contract       only tests with that in their name
  cargo xtask qemu-test vfio --iommu amd --keep    on another IOMMU, and leave me a shell in the machine
  cargo xtask qemu-test vfio --kernel linux-image-7.3.deb
  COIOMMU_STRESS_SECONDS=600 cargo xtask qemu-test vfio --test storm")]
pub(crate) struct Args {
    #[command(flatten)]
    choices: Choices,
    /// The machine's IOMMU
    #[arg(long, default_value = "intel")]
    iommu: Iommu,
    /// Leave the machine up when the tests are done, with a shell on this terminal
    #[arg(long)]
    keep: bool,
    /// Only tests with this in their name
    #[arg(long, value_name = "FILTER")]
    test: Option<String>,
    /// How long the machine may take, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    time_limit: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Iommu {
    /// VT-d
    Intel,
    /// AMD-Vi (QEMU 7.2 does not report an access to what is not mapped: the tests that wait for that fail there)
    Amd,
}

impl Iommu {
    fn device(self) -> &'static str {
        match self {
            Self::Intel => "-device intel-iommu,intremap=on",
            Self::Amd => "-device amd-iommu,intremap=on",
        }
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    tools::require_for_vms(&args.choices.qemu)?;
    let claim = Claim::take()?;
    let kernel = Kernel::find(args.choices.kernel.as_deref())?;
    let program = build()?;
    let initramfs = Initramfs::new(&kernel, &["vfio-pci", "vfio_iommu_type1"], &job(args.test.as_deref()))?;
    initramfs.add(&program, "bin/hardware")?;
    let file = Path::new(FOLDER).join("vfio.cpio");
    initramfs.write(&file)?;

    let disk = machine::disk("nvme.img", 512)?;
    let options = [
        args.iommu.device().to_owned(),
        // It can reach all that the IOMMU can map.
        "-device edu,dma_mask=0x7fffffffff".to_owned(),
        // Two devices that the IOMMU cannot tell apart, the second of which the kernel drives.
        "-device pcie-pci-bridge,id=bridge".to_owned(),
        "-device pci-testdev,bus=bridge,addr=1".to_owned(),
        "-device virtio-rng-pci,bus=bridge,addr=2".to_owned(),
        format!("-drive if=none,id=disk,format=raw,file={}", disk.display()),
        "-device nvme,drive=disk,serial=coiommu".to_owned(),
        // It has MSI with many messages.
        "-device nec-usb-xhci".to_owned(),
    ];
    eprintln!("booting Linux {} with {:?}'s IOMMU, edu, nvme and xHCI", kernel.version(), args.iommu);
    let ended = Machine {
        claim: &claim,
        emulator: &Emulator::named(&args.choices.qemu),
        accel: args.choices.accel,
        image: kernel.image(),
        initramfs: &file,
        memory: 2048,
        options: options.into(),
        append: "intel_iommu=on printk.devkmsg=on".to_owned(),
        keep: args.keep,
        time_limit: Duration::from_secs(args.time_limit),
        may_reboot: false,
        answer: &|_, _| Ok(Answer::Nothing),
    }
    .run()?;
    let (passed, failed) = harness::sum(ended.lines.iter().map(String::as_str));
    Ok(judge(&ended, &complaints_of_tests(passed, failed), &format!("{passed} tests passed")))
}

/// The tests, as one program that needs no library.
fn build() -> anyhow::Result<PathBuf> {
    const LINE: &str = "cargo test --no-run --locked --release -p coiommu-vfio --features type1 --test hardware \
                        --target x86_64-unknown-linux-gnu --message-format json-render-diagnostics";
    ensure!(cfg!(target_arch = "x86_64"), "the machine is an x86-64, and its tests are built on one");
    eprintln!("$ {LINE}");
    // A target that is named, so that build scripts and macros, which run in the compiler, are built as always.
    let mut command: Command = step::command(LINE);
    command.env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=debuginfo").env_remove("CARGO_ENCODED_RUSTFLAGS");
    command.stderr(std::process::Stdio::inherit());
    let messages = step::output_of(&mut command, LINE)?;
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut programs = messages.filter_map(|message| Some(PathBuf::from(message["executable"].as_str()?)));
    programs.next().context("cargo built no program of tests")
}

fn complaints_of_tests(passed: u64, failed: u64) -> Vec<String> {
    let mut complaints = Vec::new();
    if failed > 0 {
        complaints.push(format!("{failed} tests failed"));
    }
    if passed == 0 {
        complaints.push("no test passed: does the filter name one?".to_owned());
    }
    complaints
}

/// Only a program that a test starts, which would count as one that passed.
const NO_TEST: &str = "kill::victim";

/// What the machine is booted for.
fn job(filter: Option<&str>) -> String {
    // No quote can end the word that it is in.
    let filter = filter.map(|filter| format!(" '{}'", filter.replace('\'', ""))).unwrap_or_default();
    format!(
        "for device in /sys/bus/pci/devices/*; do
    if [ -e $device/driver ]; then continue; fi
    case $(cat $device/class) in
        0x00ff00 | 0x010802 | 0x0c0330)
            echo vfio-pci >$device/driver_override
            echo ${{device##*/}} >/sys/bus/pci/drivers_probe
            ;;
    esac
done
{variables}exec hardware --ignored --test-threads=1 --nocapture --skip {NO_TEST}{filter}
",
        variables = variables(|name| std::env::var(name).ok()),
    )
}

/// What the tests take from the environment: numbers, so nothing needs a quote.
fn variables(value: impl Fn(&str) -> Option<String>) -> String {
    let is_number = |value: &String| value.bytes().all(|byte| byte.is_ascii_digit());
    let line = |name| Some(format!("export {name}={}\n", value(name).filter(is_number)?));
    ["COIOMMU_STRESS_SECONDS", "COIOMMU_STRESS_SEED"].into_iter().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tests_that_ran_and_passed_are_good() {
        assert_eq!(complaints_of_tests(3, 0), [""; 0]);
        assert_eq!(complaints_of_tests(3, 1), ["1 tests failed"]);
        assert_eq!(complaints_of_tests(0, 0), ["no test passed: does the filter name one?"]);
    }

    #[test]
    fn a_filter_is_one_word() {
        assert!(job(Some("a b'; reboot")).ends_with(" 'a b; reboot'\n"));
        assert!(job(None).ends_with("--skip kill::victim\n"));
    }

    #[test]
    fn only_numbers_are_passed_on() {
        let text = |value: &str| variables(|name| (name == "COIOMMU_STRESS_SECONDS").then(|| value.to_owned()));
        assert_eq!(text("7"), "export COIOMMU_STRESS_SECONDS=7\n");
        assert_eq!(text("7; reboot"), "");
    }
}
