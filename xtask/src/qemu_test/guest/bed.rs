//! What the scenes have in common: a guest with its devices, and data that it reads and writes.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::ensure;
use serde_json::Value;

use super::Args;
use super::server::Server;
pub(super) use crate::qemu_test::counters::{Counters, compare, of_server};
use crate::qemu_test::data::SOURCE;
use crate::qemu_test::{LIB, data, judge};
use crate::vm::{Answer, Claim, Emulator, Ended, FOLDER, Initramfs, Kernel, Machine, Tree, machine};

/// What a guest downloads of what it copies to its disk and back, in MiB.
pub(super) const DOWNLOAD: u64 = 50;
/// How often, at most.
pub(super) const ROUNDS: u64 = 3;

/// What guests of one kernel are made of.
pub(super) struct Bed<'a> {
    pub(super) args: &'a Args,
    pub(super) claim: &'a Claim,
    pub(super) emulator: &'a Emulator,
    pub(super) tree: &'a Tree,
    pub(super) kernel: Kernel,
    /// The guest's driver.
    pub(super) module: &'a Path,
    /// `coiommu`.
    pub(super) program: &'a Path,
}

/// A guest that is booted once.
pub(super) struct Guest<'a> {
    /// What it is booted for, after [`LIB`].
    pub(super) job: &'a str,
    /// In MiB.
    pub(super) memory: u32,
    /// Devices besides those that every guest has.
    pub(super) devices: Vec<String>,
    /// Programs besides busybox.
    pub(super) programs: Vec<(PathBuf, &'a str)>,
    pub(super) append: &'a str,
    pub(super) may_reboot: bool,
}

impl Default for Guest<'_> {
    fn default() -> Self {
        Self { job: "", memory: 1024, devices: Vec::new(), programs: Vec::new(), append: "", may_reboot: false }
    }
}

/// What a scene says that did not get as far.
pub(super) const NO_END: &str = "the guest did not come to the end of its work";

/// The endpoints that guests have: an nvme and an e1000e.
pub(super) const ENDPOINTS: [&str; 2] = ["--endpoint=00:03.0", "--endpoint=00:05.0"];

impl Bed<'_> {
    /// A server for the endpoints that guests have.
    pub(super) fn serve(&self, arguments: &[&str]) -> anyhow::Result<Server> {
        Server::start(self.program, &[&ENDPOINTS, arguments].concat())
    }

    /// Boots a guest, and waits until it is off. Besides its own devices, it has an nvme and an e1000e, disks with what is to be
    /// copied (`/dev/vda`) and for what was read back (`vdb`) and downloaded (`vdc`).
    pub(super) fn boot(
        &self,
        guest: Guest<'_>,
        answer: &dyn Fn(&str, u32) -> anyhow::Result<Answer>,
    ) -> anyhow::Result<Ended> {
        let job = [LIB, guest.job].concat();
        let initramfs = Initramfs::new(&self.kernel, &["virtio_blk"], &job)?;
        let crc32c = self.kernel.knows("crc32c_generic").then_some("crc32c_generic");
        let modules = ["nvme", "e1000e", "ext4", "pcnet32"].into_iter().chain(crc32c);
        self.kernel.install_modules(&modules.collect::<Vec<_>>(), initramfs.root())?;
        self.kernel.add_module(self.module, initramfs.root())?;
        for (program, name) in &guest.programs {
            initramfs.add(program, name)?;
        }
        let file = Path::new(FOLDER).join("guest.cpio");
        initramfs.write(&file)?;
        let ended = Machine {
            claim: self.claim,
            emulator: self.emulator,
            accel: self.args.choices.accel,
            image: self.kernel.image(),
            initramfs: &file,
            memory: guest.memory,
            options: options(guest.memory)?.into_iter().chain(guest.devices).collect(),
            append: guest.append.to_owned(),
            keep: self.args.keep,
            time_limit: Duration::from_secs(self.args.time_limit),
            may_reboot: guest.may_reboot,
            answer,
        }
        .run()?;
        Ok(ended)
    }

    /// As [`boot`](Self::boot): gives the server's figures too, of when the guest, at rest, said `compare`.
    pub(super) fn boot_and_compare(
        &self,
        guest: Guest<'_>,
        server: &Server,
        answer: &dyn Fn(&str, u32) -> anyhow::Result<Answer>,
    ) -> anyhow::Result<(Ended, Option<Value>)> {
        let stats = RefCell::new(None);
        let ended = self.boot(guest, &|line, process| {
            if line != "compare" {
                return answer(line, process);
            }
            stats.replace(Some(server.stats()?));
            Ok(Answer::Say("go on".to_owned()))
        })?;
        Ok((ended, stats.take()))
    }

    /// Says what was wrong with a guest, or what was good.
    pub(super) fn judge(&self, ended: &Ended, complaints: &[String], good: &str) -> anyhow::Result<()> {
        let good = format!("Linux {}: {good}", self.kernel.version());
        ensure!(judge(ended, complaints, &good) == ExitCode::SUCCESS, "see above");
        Ok(())
    }
}

/// Options of every guest.
fn options(memory: u32) -> anyhow::Result<Vec<String>> {
    let source = data::source()?;
    let nvme = machine::disk("nvme.img", SOURCE * 2)?;
    let mut options = vec![
        format!("-object memory-backend-memfd,id=ram,size={memory}M,share=on"),
        "-machine memory-backend=ram".to_owned(),
        format!("-drive if=none,id=nvme,format=raw,file={}", nvme.display()),
        "-device nvme,drive=nvme,serial=coiommu,addr=03.0".to_owned(),
        // Runs a program a connection, by path.
        format!(
            "-netdev user,id=net,restrict=on,guestfwd=tcp:10.0.2.100:80-cmd:head -c {}M {}",
            DOWNLOAD,
            source.display()
        ),
    ];
    let read = machine::disk(READ, SOURCE * ROUNDS)?;
    let got = machine::disk(GOT, DOWNLOAD * ROUNDS)?;
    // Out of the way of the addresses that devices are given.
    for (id, file, rest, address) in
        [("source", source, ",readonly=on", "10"), ("read", read, "", "11"), ("got", got, "", "12")]
    {
        options.push(format!("-drive if=none,id={id},format=raw,file={}{rest}", file.display()));
        options.push(format!("-device virtio-blk-pci,drive={id},addr={address}"));
    }
    Ok(options)
}

const READ: &str = "read.img";
const GOT: &str = "got.img";

/// What is wrong with what a guest has read back in a round, the first of which is 0.
pub(super) fn wrong_read(round: u64) -> anyhow::Result<Option<String>> {
    wrong_bytes(READ, round, SOURCE)
}

/// What is wrong with what a guest has downloaded in a round.
pub(super) fn wrong_download(round: u64) -> anyhow::Result<Option<String>> {
    wrong_bytes(GOT, round, DOWNLOAD)
}

fn wrong_bytes(name: &str, round: u64, mib: u64) -> anyhow::Result<Option<String>> {
    data::wrong_bytes(name, round * (mib << 20), mib << 20)
}
