//! `cargo xtask record-trace`: a trace of the DMA of a Linux guest at work, for `coiommu replay`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};

use crate::vm::{Answer, Choices, Claim, Emulator, FOLDER, Initramfs, Kernel, Machine, console, machine, tools};
use crate::{paths, step};

/// Record a trace of a Linux guest's DMA: it boots, writes and reads files on an nvme, and downloads through an e1000e
///
/// The events of DMA are there in Linux 6.12 and newer.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  cargo xtask record-trace my.trace.zst
  cargo run --release -p coiommu-cli -- replay my.trace.zst --memory 2g")]
pub(crate) struct Args {
    /// Where it goes: a name that ends in .zst is compressed by zstd, .gz by gzip, any other not at all
    #[arg(value_parser = paths::path())]
    output: PathBuf,
    #[command(flatten)]
    choices: Choices,
    /// The guest's memory
    #[arg(long, value_name = "MIB", default_value_t = 2048)]
    memory: u32,
    /// How much it writes, reads and downloads, each
    #[arg(long, value_name = "MIB", default_value_t = 48)]
    load: u32,
    /// How long the machine may take, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    time_limit: u64,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    tools::require_for_vms(&args.choices.qemu)?;
    let claim = Claim::take()?;
    let kernel = Kernel::find(args.choices.kernel.as_deref())?;
    let initramfs = Initramfs::new(&kernel, &[], &job(args.load))?;
    let mut modules = vec!["nvme", "e1000e", "ext4"];
    // What ext4 computes its checksums with, on kernels that have it apart.
    modules.extend(kernel.knows("crc32c_generic").then_some("crc32c_generic"));
    kernel.install_modules(&modules, initramfs.root())?;
    let file = Path::new(FOLDER).join("trace.cpio");
    initramfs.write(&file)?;

    let disk = machine::disk("trace.img", u64::from(args.load) * 2 + 64)?;
    let trace = Path::new(FOLDER).join("trace.txt");
    let options = [
        format!("-drive if=none,id=disk,format=raw,file={}", disk.display()),
        "-device nvme,drive=disk,serial=coiommu".to_owned(),
        // Whoever connects there is sent as much as is to be downloaded.
        format!("-netdev user,id=net,restrict=on,guestfwd=tcp:10.0.2.100:80-cmd:head -c {}M /dev/zero", args.load),
        "-device e1000e,netdev=net".to_owned(),
        format!("-chardev file,id=trace,path={}", trace.display()),
        "-device virtserialport,chardev=trace,name=trace".to_owned(),
    ];
    eprintln!("booting Linux {} with an nvme and an e1000e", kernel.version());
    let ended = Machine {
        claim: &claim,
        emulator: &Emulator::named(&args.choices.qemu),
        accel: args.choices.accel,
        image: kernel.image(),
        initramfs: &file,
        memory: args.memory,
        options: options.into(),
        append: String::new(),
        keep: false,
        time_limit: Duration::from_secs(args.time_limit),
        may_reboot: false,
        answer: &|_, _| Ok(Answer::Nothing),
    }
    .run()?;
    ensure!(!ended.was_stopped, "it took longer than --time-limit, {} s", args.time_limit);
    if ended.exit != Some(0) {
        bail!("the guest did not do its work: see above, and {FOLDER}/console.log");
    }
    let complaints = console::complaints(&ended.console);
    ensure!(complaints.is_empty(), "the guest's kernel says:\n{}", complaints.join("\n"));
    save(&trace, &args.output)?;
    eprintln!("coiommu replay {} --memory {}m", args.output.display(), args.memory);
    Ok(ExitCode::SUCCESS)
}

fn save(trace: &Path, to: &Path) -> anyhow::Result<()> {
    let cannot_write = || format!("cannot write {}", to.display());
    let Some(compress) = compressor(to) else {
        return fs::copy(trace, to).map(drop).with_context(cannot_write);
    };
    let mut command = step::command(compress);
    command.arg(trace).stdout(fs::File::create(to).with_context(cannot_write)?);
    step::finish(&mut command, &format!("{compress} {} >{}", trace.display(), to.display()))
}

/// What compresses a file of that name to its standard output.
fn compressor(name: &Path) -> Option<&'static str> {
    match name.extension()?.to_str()? {
        "zst" => Some("zstd --quiet -19 --stdout"),
        "gz" => Some("gzip -9 --stdout"),
        _ => None,
    }
}

/// What the machine is booted for.
fn job(load: u32) -> String {
    format!(
        r"set -e
trace=/sys/kernel/tracing
mount -t tracefs tracefs $trace
echo 32768 >$trace/buffer_size_kb
echo 1 >$trace/events/dma/enable
modprobe nvme
modprobe e1000e
for n in $(seq 100); do if [ -b /dev/nvme0n1 ]; then break; fi; sleep 0.1; done

modprobe crc32c_generic 2>/dev/null || true
modprobe ext4
mke2fs /dev/nvme0n1 >/dev/null
mkdir /mnt
mount -t ext4 /dev/nvme0n1 /mnt
echo writing and reading {load} MiB
dd if=/dev/urandom of=/mnt/file bs=64k count={count} 2>/dev/null
sync
echo 3 >/proc/sys/vm/drop_caches
cat /mnt/file >/dev/null
for n in $(seq 100); do head -c 3000 /dev/urandom >/mnt/small$n; done
sync

echo downloading {load} MiB
ip link set dev eth0 up
ip addr add 10.0.2.15/24 dev eth0
for n in $(seq 100); do if [ $(cat /sys/class/net/eth0/carrier) = 1 ]; then break; fi; sleep 0.1; done
got=$(nc 10.0.2.100 80 </dev/null | wc -c)
if [ $got != {bytes} ]; then
    echo only $got of {bytes} bytes came
    exit 1
fi
umount /mnt

echo 0 >$trace/events/dma/enable
cat $trace/trace >/dev/port-trace
if cat $trace/per_cpu/cpu*/stats | grep overrun | grep -qv ': 0$'; then
    echo 'events were lost: try a smaller --load'
    exit 1
fi
",
        count = u64::from(load) * 16,
        bytes = u64::from(load) << 20,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_says_how_it_is_compressed() {
        let of = |name: &str| compressor(Path::new(name)).and_then(|line| line.split(' ').next());
        assert_eq!(of("a/my.trace.zst"), Some("zstd"));
        assert_eq!(of("my.trace.gz"), Some("gzip"));
        assert_eq!([of("my.trace"), of("gz"), of("my.gz/trace")], [None; 3]);
    }

    #[test]
    fn what_is_saved_can_be_read() {
        let folder = tempfile::tempdir().unwrap();
        let trace = folder.path().join("trace.txt");
        fs::write(&trace, "dma_map_page: one\n".repeat(1000)).unwrap();
        let plain = folder.path().join("saved.trace");
        save(&trace, &plain).unwrap();
        assert_eq!(fs::read(&plain).unwrap(), fs::read(&trace).unwrap());
        let packed = folder.path().join("saved.trace.gz");
        fs::write(&packed, "an older one").unwrap();
        save(&trace, &packed).unwrap();
        assert!(fs::metadata(&packed).unwrap().len() < 1000);
        let read = step::output(&format!("gzip -dc {}", packed.display())).unwrap();
        assert_eq!(read.as_bytes(), fs::read(&trace).unwrap());
        assert!(save(&trace, &folder.path().join("no/such/folder.gz")).is_err());
    }

    #[test]
    fn a_download_that_is_short_is_no_trace() {
        assert!(job(48).contains("!= 50331648 ]; then"));
    }
}
