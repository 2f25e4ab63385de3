//! QEMU: whether it speaks vfio-user.

use std::io;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use super::check::Check;
use super::host::version;

const NAME: &str = "qemu";

/// The first QEMU that speaks vfio-user as a client.
const OLDEST: (u32, u32) = (10, 1);

/// The QEMU for guests of this machine's kind.
pub(super) fn default_program() -> String {
    format!("qemu-system-{}", std::env::consts::ARCH)
}

pub(super) fn check(program: &Path) -> Check {
    let shown = program.display();
    let output = match ask(program, &["--version"]) {
        Ok(output) => output,
        Err(error) => {
            let seen = match error.kind() {
                io::ErrorKind::NotFound => format!("there is no {shown}"),
                _ => format!("{shown} cannot be run: {error}"),
            };
            return Check::failed(NAME, seen, TAKE);
        }
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let first = text.lines().next().unwrap_or_default();
    let Some((number, version)) = parse_version(first) else {
        return Check::failed(NAME, format!("{shown} is no QEMU, by what --version says: {first:?}"), TAKE);
    };
    let seen = format!("QEMU {number}");
    if version < OLDEST {
        return Check::failed(NAME, format!("{seen}, which does not speak vfio-user"), TAKE);
    }
    // It exits with 0, whether it has the device or not.
    let speaks =
        ask(program, &["-device", "vfio-user-pci,help"]).is_ok_and(|help| help.stdout.starts_with(b"vfio-user-pci"));
    if speaks {
        Check::ok(NAME, format!("{seen}, with vfio-user-pci"))
    } else {
        Check::failed(NAME, format!("{seen}, built without vfio-user-pci"), TAKE)
    }
}

const TAKE: &str =
    "take QEMU 10.1 or newer and name it with --qemu; with another VMM that speaks vfio-user, say --no-qemu";

fn ask(program: &Path, arguments: &[&str]) -> io::Result<Output> {
    Command::new(program).args(arguments).stdin(Stdio::null()).output()
}

/// Of `QEMU emulator version 11.1.3 (Debian …)`: as it is written, and as numbers.
fn parse_version(line: &str) -> Option<(&str, (u32, u32))> {
    let number = line.strip_prefix("QEMU emulator version ")?.split_whitespace().next()?;
    Some((number, version(number)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_found() {
        let debian = "QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)";
        assert_eq!(parse_version(debian), Some(("11.1.3", (11, 1))));
        assert_eq!(parse_version("QEMU emulator version 10.0.91 (v10.1.0-rc1)"), Some(("10.0.91", (10, 0))));
        assert_eq!(parse_version("cat (GNU coreutils) 9.1"), None);
        assert_eq!(parse_version(""), None);
    }
}
