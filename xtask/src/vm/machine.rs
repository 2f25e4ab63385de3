//! QEMU: its command line, its time, and what the machine says.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::ValueEnum;

use super::process::Process;
use super::{Claim, Emulator, FOLDER, console, folder};

/// Software that runs a machine's instructions, on a host that is busy with other things, is slow, and late: the kernel
/// does nothing that only guards real processors, does not insist on its timer, and takes no lateness for a lock-up.
pub(crate) const IN_NO_HURRY: &str =
    "mitigations=off no_timer_check rcupdate.rcu_cpu_stall_timeout=120 watchdog_thresh=60";

/// How often a kernel is booted that does not come up.
const BOOTS: usize = 3;

/// Who runs the machine's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Accel {
    /// Software: slow, and works everywhere
    Tcg,
    /// The processor: takes /dev/kvm
    Kvm,
}

/// A machine to be booted.
pub(crate) struct Machine<'a> {
    /// Its files are in the folder.
    pub(crate) claim: &'a Claim,
    pub(crate) emulator: &'a Emulator,
    pub(crate) accel: Accel,
    /// The kernel: a file to boot.
    pub(crate) image: PathBuf,
    pub(crate) initramfs: &'a Path,
    /// In MiB.
    pub(crate) memory: u32,
    /// Options of QEMU, each with its value: devices.
    pub(crate) options: Vec<String>,
    /// For the kernel's command line.
    pub(crate) append: String,
    /// Leave it up, with a console on standard input and output.
    pub(crate) keep: bool,
    pub(crate) time_limit: Duration,
    /// It may be reset, and is not over then.
    pub(crate) may_reboot: bool,
    /// What to do when the job has written a line, on a machine that is this process; mostly nothing.
    pub(crate) answer: &'a dyn Fn(&str, u32) -> anyhow::Result<Answer>,
}

/// What to do about a line that a job has written.
#[derive(Debug)]
pub(crate) enum Answer {
    Nothing,
    /// The job is told something: it reads that from where it writes to.
    Say(String),
    /// The machine is ended at once, as if it were switched off.
    Kill,
}

/// What became of a machine.
#[derive(Debug)]
pub(crate) struct Ended {
    /// What the job wrote, in lines, without the last one, which says how it exited.
    pub(crate) lines: Vec<String>,
    /// What the job exited with; `None`: it did not get there.
    pub(crate) exit: Option<i32>,
    /// What the kernel wrote to its console.
    pub(crate) console: String,
    /// It took longer than it may.
    pub(crate) was_stopped: bool,
    /// The signal that ended the emulator, if one did.
    pub(crate) signal: Option<i32>,
    /// Its kernel came as far as the first process.
    pub(crate) has_begun: bool,
}

/// What comes from a job.
enum Heard {
    Connected(UnixStream),
    Line(String),
}

impl Machine<'_> {
    /// Boots it, and waits until it is off. What the job writes goes to standard output as it comes.
    ///
    /// A kernel that does not come as far as its first process is booted again: with a thread a CPU, software may run
    /// an instruction that another CPU has just patched, and the kernel dies of that now and then.
    pub(crate) fn run(&self) -> anyhow::Result<Ended> {
        for _ in 1..BOOTS {
            let ended = self.boot()?;
            if ended.has_begun || ended.was_stopped {
                return Ok(ended);
            }
            let trouble = console::complaints(&ended.console).first().map_or("no complaint", |line| *line).to_owned();
            eprintln!("the kernel did not come up ({trouble}): booting again");
        }
        self.boot()
    }

    fn boot(&self) -> anyhow::Result<Ended> {
        let scratch = folder::scratch()?;
        // The path of a socket has room for about 100 letters, which the one from the root might not fit in.
        let here = std::env::current_dir()?;
        let socket = scratch.path().join("job");
        let socket = socket.strip_prefix(&here).unwrap_or(&socket);
        let listener = UnixListener::bind(socket).context("cannot listen for the machine")?;
        let console = Path::new(FOLDER).join("console.log");
        fs::write(&console, "")?;

        let mut process = Process::spawn(&mut self.command(socket, &console)?).context("cannot run setpriv")?;
        let (to, from) = mpsc::channel();
        thread::spawn(move || {
            let Ok((stream, _)) = listener.accept() else { return };
            let Ok(other) = stream.try_clone() else { return };
            if to.send(Heard::Connected(other)).is_err() {
                return;
            }
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            while stream.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                line.clear();
                if to.send(Heard::Line(text)).is_err() {
                    break;
                }
            }
        });
        let (mut lines, mut exit, mut was_stopped, mut has_begun) = (Vec::new(), None, false, false);
        let mut job = None;
        let (start, mut ended) = (Instant::now(), None);
        loop {
            match from.recv_timeout(Duration::from_millis(200)) {
                Ok(Heard::Connected(stream)) => job = Some(stream),
                Ok(Heard::Line(line)) if line == "job: begins" => has_begun = true,
                Ok(Heard::Line(line)) => match line.strip_prefix("job: exit ") {
                    Some(code) => exit = code.parse().ok(),
                    None => {
                        println!("{line}");
                        match ((self.answer)(&line, process.id())?, &mut job) {
                            (Answer::Kill, _) => process.kill()?,
                            // Where it has ended, it is not told.
                            (Answer::Say(answer), Some(stream)) => _ = writeln!(stream, "{answer}"),
                            (Answer::Say(_), None) | (Answer::Nothing, _) => {}
                        }
                        lines.push(line);
                    }
                },
                // It has ended, and all that it said was read.
                Err(RecvTimeoutError::Disconnected) if ended.is_some() => break,
                Err(RecvTimeoutError::Disconnected) => thread::sleep(Duration::from_millis(50)),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if ended.is_none() && process.has_ended()? {
                ended = Some(Instant::now());
            }
            // It may not even have connected.
            if ended.is_some_and(|ended| ended.elapsed() > Duration::from_secs(5)) {
                break;
            }
            // Who looks around in it takes the time that it takes.
            let is_over = exit.is_some() && self.keep;
            if start.elapsed() > self.time_limit && !is_over {
                was_stopped = true;
                break;
            }
        }
        let signal = process.ended_by()?;
        drop(process);
        let console = fs::read(&console).context("cannot read the console's log")?;
        let console = String::from_utf8_lossy(&console).into_owned();
        Ok(Ended { lines, exit, console, was_stopped, signal, has_begun })
    }

    fn command(&self, socket: &Path, console: &Path) -> anyhow::Result<Command> {
        let accel = match self.accel {
            Accel::Tcg => "tcg,thread=multi",
            Accel::Kvm => "kvm",
        };
        let console = console.display();
        let backend = if self.keep { "stdio,mux=on,signal=off" } else { "null" };
        let mut append = format!("console=ttyS0 panic=-1 {IN_NO_HURRY} {}", self.append);
        if self.keep {
            append += " keep";
        }
        let memory = self.memory.to_string();
        let chardev_console = format!("{backend},id=console,logfile={console}");
        let chardev_job = format!("socket,id=job,path={}", socket.display());
        let mut command = self.emulator.command();
        command
            .args(["-M", "q35,kernel-irqchip=split", "-accel", accel, "-cpu", "max", "-smp", "2", "-m", &memory])
            .args(["-nodefaults", "-display", "none"])
            .args((!self.may_reboot).then_some("-no-reboot"))
            .args(["-chardev", &chardev_console, "-serial", "chardev:console"])
            .args([
                "-chardev",
                &chardev_job,
                "-device",
                "virtio-serial",
                "-device",
                "virtserialport,chardev=job,name=job",
            ])
            .args(self.options.iter().flat_map(|option| option.splitn(2, ' ')))
            .arg("-kernel")
            .arg(&self.image)
            .arg("-initrd")
            .arg(self.initramfs)
            .args(["-append", &append]);
        if !self.keep {
            // It reads nothing there, but has the claim until it is gone, even if we are killed.
            command.stdin(self.claim.share()?);
        }
        Ok(command)
    }
}

/// An empty disk of so many MiB, which takes no room until it is written to.
pub(crate) fn disk(name: &str, mib: u64) -> anyhow::Result<PathBuf> {
    let path = Path::new(FOLDER).join(name);
    let file = fs::File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
    file.set_len(mib << 20)?;
    Ok(path)
}
