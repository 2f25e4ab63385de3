//! A program that ends when this one does, however that ends.

use std::io;
use std::marker::PhantomData;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

/// How long a program may take to end after it was asked to.
const GRACE: Duration = Duration::from_secs(5);

/// A running program. When it is dropped, it is asked to end, and later made to.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    grace: Duration,
    /// The kernel takes the end of the thread that started it for the end of its parent: no other thread may have this.
    _of_this_thread: PhantomData<*const ()>,
}

impl Process {
    /// A program that the kernel asks to end if we are killed; to be completed, then spawned.
    pub(crate) fn command(program: &Path) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "TERM", "--"]).arg(program);
        command
    }

    /// Starts what [`Process::command`] made.
    pub(crate) fn spawn(command: &mut Command) -> io::Result<Self> {
        Ok(Self { child: command.spawn()?, grace: GRACE, _of_this_thread: PhantomData })
    }

    pub(crate) fn has_ended(&mut self) -> io::Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// The signal that has ended it, if one has.
    pub(crate) fn ended_by(&mut self) -> io::Result<Option<i32>> {
        Ok(self.child.try_wait()?.and_then(|status| status.signal()))
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Ends it with no warning.
    pub(crate) fn kill(&mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop)
    }

    /// Asks it to end, and waits for that. False if it did not.
    fn end(&mut self) -> io::Result<bool> {
        let asked = Instant::now();
        // std can send no signal but SIGKILL, which leaves a program no time to write what it holds. The number is still
        // its own, as nobody has waited for it.
        if !self.has_ended()? {
            Command::new("sh").args(["-c", &format!("kill -TERM {}", self.child.id())]).status()?;
        }
        while asked.elapsed() < self.grace {
            if self.has_ended()? {
                return Ok(true);
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(false)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.end().unwrap_or(false) {
            let _killed = self.child.kill();
            let _status = self.child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Read as _};
    use std::process::{ChildStdout, Stdio};

    use super::*;

    /// A shell at work; it has said that it runs.
    fn shell(script: &str) -> (Process, BufReader<ChildStdout>) {
        let mut command = Process::command(Path::new("sh"));
        command.args(["-c", script]).stdout(Stdio::piped());
        let mut process = Process::spawn(&mut command).unwrap();
        let mut output = BufReader::new(process.child.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        (process, output)
    }

    /// What it said in the end, and that it ended early.
    fn rest(mut output: BufReader<ChildStdout>) -> String {
        let start = Instant::now();
        let mut rest = String::new();
        output.read_to_string(&mut rest).unwrap();
        assert!(start.elapsed() < Duration::from_secs(30), "it ended by itself");
        rest
    }

    #[test]
    fn it_does_not_outlive_who_started_it() {
        let starter = thread::spawn(|| {
            let (process, output) = shell("echo ready; exec sleep 60");
            // As if killed: nothing is dropped.
            std::mem::forget(process);
            output
        });
        assert_eq!(rest(starter.join().unwrap()), "");
    }

    #[test]
    fn it_is_asked_to_end() {
        let (process, output) =
            shell("trap 'echo done; exit' TERM; echo ready; for n in $(seq 600); do sleep 0.1; done");
        drop(process);
        assert_eq!(rest(output), "done\n");
    }

    #[test]
    fn who_does_not_listen_is_made_to_end() {
        let (mut process, output) = shell("trap '' TERM; echo ready; exec sleep 60");
        process.grace = Duration::from_millis(200);
        let start = Instant::now();
        drop(process);
        assert_eq!(rest(output), "");
        assert!(start.elapsed() < Duration::from_secs(30), "it ended by itself");
    }

    #[test]
    fn one_that_has_ended_is_let_be() {
        let (mut process, output) = shell("echo ready");
        assert_eq!(rest(output), "");
        while !process.has_ended().unwrap() {
            thread::yield_now();
        }
        let start = Instant::now();
        drop(process);
        assert!(start.elapsed() < GRACE);
    }
}
