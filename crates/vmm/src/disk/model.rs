//! A disk as a virtio device: one request of its queue at a time.

use super::{Image, Stamp};
use crate::virtio::{Model, Queues};
use crate::{Error, Result};
use anyvisor_devices::state::BadState;
use anyvisor_devices::virtio::Broken;
use anyvisor_devices::virtio::block::{self, Storage};
use anyvisor_devices::virtio::pci::Offer;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A disk on an image.
pub struct DiskModel {
    image: Image,
}

/// A disk in a snapshot.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    image: Stamp,
}

impl DiskModel {
    pub fn new(image: Image) -> DiskModel {
        DiskModel { image }
    }

    fn trouble(&self, what: &str, error: std::io::Error) -> Error {
        Error::host(format!("cannot {what} disk '{}'", self.image.path().display()), error)
    }
}

impl Model for DiskModel {
    fn name(&self) -> String {
        format!("disk '{}'", self.image.path().display())
    }

    fn offer(&self) -> Offer {
        block::offer(&self.image)
    }

    fn work(&mut self, queues: &mut Queues<'_>) -> Result<(), Broken> {
        while let Some(chain) = queues.pop(0)? {
            let length = block::serve(&chain, queues.features(), &self.image, queues.memory(), queues.written())?;
            queues.push(0, chain.head, length)?;
            queues.signal()?;
        }
        Ok(())
    }

    /// What the guest has written lasts after this.
    fn save(&mut self) -> Result<Value> {
        self.image.flush().map_err(|error| self.trouble("write through", error))?;
        let image = self.image.stamp().map_err(|error| self.trouble("look at", error))?;
        Ok(serde_json::to_value(Saved { image }).expect("it is plain data"))
    }

    fn difference(&self, saved: &Value) -> Result<Option<String>> {
        let now = self.image.stamp().map_err(|error| self.trouble("look at", error))?;
        // What makes no sense is refused later.
        let Ok(saved) = serde_json::from_value::<Saved>(saved.clone()) else { return Ok(None) };
        let name = self.image.path().display();
        Ok((now != saved.image).then(|| {
            format!(
                "disk '{name}' has changed since; put the image back as it was then (a copy made with cp -p while the VM \
                 was paused or had ended)"
            )
        }))
    }

    fn restore(&mut self, saved: &Value) -> Result<(), BadState> {
        let saved = serde_json::from_value::<Saved>(saved.clone());
        saved.map(drop).map_err(|_| BadState { chip: "disk", what: "its image is not described" })
    }
}

#[cfg(test)]
mod tests {
    use super::super::open;
    use super::*;
    use crate::config::Disk;
    use crate::virtio::driver::fuzz;

    #[test]
    fn nonsense_in_a_disks_queue_is_taken() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let disk = Disk { path: image.path().to_owned(), read_only: false, format: None };
        let mut model = DiskModel::new(open(&[disk]).unwrap().remove(0));
        let request = |kind: u32, sector: u64| {
            [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes(), &[8, 0, 0, 0, 0, 0, 0, 0]].concat()
        };
        let headers: Vec<_> =
            [0, 1, 4, 8, 11, 13, 99].iter().flat_map(|kind| [request(*kind, 3), request(*kind, 2040)]).collect();
        let taken = fuzz(&mut model, &headers, 500, 1);
        assert!(taken.broken > 50 && taken.answered > 1000, "{taken:?}");
        assert_eq!(image.as_file().metadata().unwrap().len(), 1 << 20);
    }
}
