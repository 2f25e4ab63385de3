//! `--passthrough host=…,guest=…,socket=…`.

use std::path::PathBuf;
use std::str::FromStr;

use coiommu_dtt::Bdf;

use crate::host_bdf::HostBdf;

/// A device to pass through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DeviceArgument {
    /// Where the host has it.
    pub(crate) host: HostBdf,
    /// Where the guest has it.
    pub(crate) guest: Bdf,
    /// Where its VMM finds it.
    pub(crate) socket: PathBuf,
}

impl FromStr for DeviceArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut host, mut guest, mut socket) = (None, None, None);
        for pair in text.split(',') {
            let (key, value) = pair.split_once('=').ok_or_else(|| format!("{pair:?} is not key=value"))?;
            let place = match key {
                "host" => &mut host,
                "guest" => &mut guest,
                "socket" => &mut socket,
                _ => return Err(format!("unknown key {key:?}; there are host, guest and socket")),
            };
            if place.replace(value).is_some() {
                return Err(format!("{key} is given twice"));
            }
        }
        let host = host.ok_or("host= is missing: the device's address on the host, as in host=0000:03:00.0")?;
        let guest = guest.ok_or("guest= is missing: its address in the guest, as in guest=00:05.0")?;
        let socket = socket.filter(|path| !path.is_empty());
        let socket = socket.ok_or("socket= is missing: the path of a socket that the VMM connects to")?;
        Ok(Self {
            host: host.parse().map_err(|error| format!("host={host}: {error}"))?,
            guest: guest.parse().map_err(|error| format!("guest={guest}: {error}"))?,
            socket: socket.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_named_by_three_things_in_any_order() {
        let device = DeviceArgument {
            host: "0000:03:00.0".parse().unwrap(),
            guest: "00:05.0".parse().unwrap(),
            socket: "/run/vm1-nvme.sock".into(),
        };
        for text in [
            "host=0000:03:00.0,guest=00:05.0,socket=/run/vm1-nvme.sock",
            "socket=/run/vm1-nvme.sock,host=03:00.0,guest=00:05.0",
        ] {
            assert_eq!(text.parse(), Ok(device.clone()));
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |text: &str| text.parse::<DeviceArgument>().unwrap_err();
        for (text, says) in [
            ("", "\"\" is not key=value"),
            ("host=0000:03:00.0,guest=00:05.0", "socket= is missing"),
            ("host=0000:03:00.0,guest=00:05.0,socket=", "socket= is missing"),
            ("host=0000:03:00.0,socket=s", "guest= is missing"),
            ("guest=00:05.0,socket=s", "host= is missing"),
            ("host=a,host=b", "host is given twice"),
            ("hots=a", "unknown key \"hots\""),
            ("host=0000:03:00.0,guest=00:20.0,socket=s", "guest=00:20.0: "),
            ("host=0000:03:20.0,guest=00:05.0,socket=s", "host=0000:03:20.0: "),
        ] {
            assert!(error(text).starts_with(says), "{text}: {}", error(text));
        }
    }
}
