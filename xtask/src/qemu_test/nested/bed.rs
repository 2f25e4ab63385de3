//! What the scenes have in common: the outer VM with its devices, and what is in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, ensure};

use super::devices::{self, DOWNLOAD, NVME};
use super::{Args, InnerAccel};
use crate::qemu_test::{LIB, data, driver, judge};
use crate::step;
use crate::vm::{
    Answer, Claim, Emulator, Ended, FOLDER, Initramfs, Kernel, Machine, Tree, console, machine, machine::IN_NO_HURRY,
};

/// In MiB. An inner guest has up to 1 GiB, and the files of the outer VM are in memory.
const MEMORY: u32 = 3072;

/// What inner kernels do not do, as it takes long in software and nothing here needs it.
const IN_A_HURRY: &str = "iommu=noaperture cryptomgr.notests tsc=nowatchdog loglevel=5 \
    initcall_blacklist=jent_mod_init,crypto_algapi_init,load_system_certificate_list,init_encrypted,init_evm,\
    bpf_tcp_ca_kfunc_init,cmos_init";

/// What scenes are played with.
pub(super) struct Bed<'a> {
    args: &'a Args,
    claim: &'a Claim,
    tree: &'a Tree,
    /// Of the outer VM, and where it starts from.
    kernel: Kernel,
    image: PathBuf,
    /// What inner guests start from.
    inner: [PathBuf; 2],
    /// `coiommu`.
    program: PathBuf,
}

impl<'a> Bed<'a> {
    pub(super) fn new(args: &'a Args, claim: &'a Claim, tree: &'a Tree, modules: &[PathBuf]) -> anyhow::Result<Self> {
        let kernel = match &args.choices.kernel {
            Some(named) => Kernel::find(Some(named))?,
            None => driver::kernel(tree, "6.12")?,
        };
        let image = kernel.unpack_image("outer-vmlinux")?;
        let inner_kernel = driver::kernel(tree, &args.series)?;
        let inner = [inner_kernel.unpack_image("inner-vmlinux")?, inner_initramfs(&inner_kernel, modules)?];
        Ok(Self { args, claim, tree, kernel, image, inner, program: build_program()? })
    }

    /// Boots the outer VM for a job, which comes after `outer.sh`, and waits until it is off. Its devices are an nvme (slot 03 of
    /// bus 0), an e1000e (05), an e1000 (06), and a USB controller (07) with a disk that has the source; `/dev/vda` has it, too.
    pub(super) fn boot(
        &self,
        job: &str,
        answer: &dyn Fn(&str, u32) -> anyhow::Result<Answer>,
    ) -> anyhow::Result<Ended> {
        let ended = Machine {
            claim: self.claim,
            emulator: &Emulator::named(&self.args.choices.qemu),
            accel: self.args.choices.accel,
            image: self.image.clone(),
            initramfs: &self.initramfs(job)?,
            memory: MEMORY,
            options: options()?,
            append: "intel_iommu=on printk.devkmsg=on".to_owned(),
            keep: self.args.keep,
            time_limit: Duration::from_secs(self.args.time_limit),
            may_reboot: false,
            answer,
        }
        .run()?;
        Ok(ended)
    }

    /// What the outer VM has: the emulator, and what guests start from.
    fn initramfs(&self, job: &str) -> anyhow::Result<PathBuf> {
        let accel = match self.args.inner_accel {
            // Of what software says of XSAVE, a kernel in a guest does not believe all.
            InnerAccel::Kvm => "kvm -cpu host,xsave=off",
            InnerAccel::Tcg => "tcg,thread=multi -cpu max,la57=off",
        };
        let variables = format!("accel='{accel}'\nappend='console=ttyS0 panic=-1 {IN_NO_HURRY} {IN_A_HURRY}'\n");
        let job = [&variables, include_str!("outer.sh"), job].concat();
        let initramfs = Initramfs::new(&self.kernel, &["virtio_blk", "vfio_iommu_type1", "vfio-pci"], &job)?;
        self.kernel.install_modules(&["kvm_amd", "kvm_intel"], initramfs.root())?;
        let [vmlinux, inner] = &self.inner;
        initramfs.add(&self.program, "bin/coiommu")?;
        Emulator::install(self.tree, initramfs.root())?;
        fs::copy(vmlinux, initramfs.root().join("qemu/vmlinux"))?;
        fs::copy(inner, initramfs.root().join("qemu/inner.cpio"))?;
        let file = Path::new(FOLDER).join("outer.cpio");
        initramfs.write(&file)?;
        Ok(file)
    }

    /// Says what was wrong with an outer VM and its guests, or what was good.
    pub(super) fn judge(&self, ended: &Ended, complaints: &[String], good: &str) -> anyhow::Result<()> {
        let log = fs::read(inner_log()).context("cannot read the log of inner guests")?;
        let log = String::from_utf8_lossy(&log);
        let of_inner = console::complaints(&log).into_iter().map(|line| format!("an inner kernel says: {line}"));
        let complaints: Vec<_> = complaints.iter().cloned().chain(of_inner).collect();
        let verdict = judge(ended, &complaints, good);
        ensure!(
            verdict == ExitCode::SUCCESS,
            "see above, and for the console of inner guests {}",
            inner_log().display()
        );
        Ok(())
    }
}

/// `coiommu`, as one program that needs no library, with what only tests may do.
fn build_program() -> anyhow::Result<PathBuf> {
    // A target that is named, so that build scripts and macros, which run in the compiler, are built as always.
    const LINE: &str = "cargo build --release --locked -p coiommu-cli --features test-hooks \
                        --target x86_64-unknown-linux-gnu";
    let mut command = step::command(LINE);
    command.env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=debuginfo").env_remove("CARGO_ENCODED_RUSTFLAGS");
    step::finish(&mut command, LINE)?;
    Ok(Path::new("target/x86_64-unknown-linux-gnu/release/coiommu").canonicalize()?)
}

/// Where the consoles of inner guests are kept.
fn inner_log() -> PathBuf {
    Path::new(FOLDER).join("inner.log")
}

fn inner_initramfs(kernel: &Kernel, modules: &[PathBuf]) -> anyhow::Result<PathBuf> {
    let job = [LIB, &devices::variables(), include_str!("inner.sh")].concat();
    let initramfs = Initramfs::new(kernel, &["virtio_blk"], &job)?;
    let drivers = ["nvme", "e1000e", "e1000", "xhci_pci", "usb_storage", "sd_mod"];
    kernel.install_modules(&drivers, initramfs.root())?;
    for module in modules {
        kernel.add_module(module, initramfs.root())?;
    }
    let file = Path::new(FOLDER).join("inner.cpio");
    initramfs.write(&file)?;
    Ok(file)
}

/// Options of the outer VM.
fn options() -> anyhow::Result<Vec<String>> {
    let source = data::source()?.display().to_string();
    let nvme = machine::disk(NVME, 256)?.display().to_string();
    fs::write(inner_log(), "")?;
    let mut options = vec![
        // A level less of page tables to walk.
        "-cpu max,la57=off".to_owned(),
        "-device intel-iommu,intremap=on".to_owned(),
        format!("-chardev file,id=inner,path={}", inner_log().display()),
        "-device virtserialport,chardev=inner,name=inner".to_owned(),
        format!("-drive if=none,id=nvme,format=raw,file={nvme}"),
        "-device nvme,drive=nvme,serial=coiommu,addr=03.0".to_owned(),
        // Without the several vectors of MSI-X, for there are drivers that use several of MSI.
        port("07"),
        "-device nec-usb-xhci,id=usb,msi=on,msix=off,intrs=4,bus=port07".to_owned(),
        "-device usb-storage,bus=usb.0,drive=stick".to_owned(),
        "-device virtio-blk-pci,drive=source,addr=10.0".to_owned(),
    ];
    for disk in ["stick", "source"] {
        options.push(format!("-drive if=none,id={disk},format=raw,readonly=on,file={source}"));
    }
    for (card, slot) in [("e1000e", "05"), ("e1000", "06")] {
        // Runs a program a connection, by path.
        let forward = format!("guestfwd=tcp:10.0.2.100:80-cmd:head -c {DOWNLOAD}M {source}");
        options.push(format!("-netdev user,id={card},restrict=on,{forward}"));
        options.push(port(slot));
        options.push(format!("-device {card},netdev={card},romfile=,bus=port{slot}"));
    }
    Ok(options)
}

/// The option by which there is a port for a device at a slot of bus 0. A device behind it can be reset, whatever it is; at
/// higher speeds the kernel waits for the link to come back, which not every emulated one does.
fn port(slot: &str) -> String {
    format!("-device pcie-root-port,id=port{slot},chassis={slot},addr={slot}.0,hotplug=off,x-speed=2_5")
}
