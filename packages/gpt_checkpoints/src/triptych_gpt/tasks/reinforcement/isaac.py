"""The cartpole in Isaac Gym itself, for those who have it: the same states, rewards and resets, PhysX in place of our equations.

Imported by nothing else. Isaac Gym wants to be imported before torch; the types of its calls come from isaacgym-stubs.
"""

from isaacgym import gymapi  # isort: skip

import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from triptych_gpt.tasks.reinforcement.cartpole import Cartpole, CartpoleBatch, State

gymtorch: Any = importlib.import_module("isaacgym.gymtorch")  # has no stubs

_URDF = """<robot name="cartpole">
  <link name="rail"/>
  <link name="cart"><inertial><mass value="{cart_mass}"/>
    <inertia ixx="1" iyy="1" izz="1" ixy="0" ixz="0" iyz="0"/></inertial></link>
  <link name="pole"><inertial><origin xyz="0 0 {pole_centre}"/><mass value="{pole_mass}"/>
    <inertia ixx="{pole_inertia}" iyy="{pole_inertia}" izz="{pole_inertia}" ixy="0" ixz="0" iyz="0"/></inertial></link>
  <joint name="rail_to_cart" type="prismatic"><axis xyz="1 0 0"/><parent link="rail"/><child link="cart"/>
    <limit effort="1000" lower="-4" upper="4" velocity="100"/></joint>
  <joint name="cart_to_pole" type="continuous"><axis xyz="0 1 0"/><parent link="cart"/><child link="pole"/>
    <limit effort="1000" velocity="8"/></joint>
</robot>
"""


def urdf(cartpole: Cartpole) -> str:
    """The cartpole as a robot description; a positive angle leans towards positive x."""
    return _URDF.format(**vars(cartpole))


class IsaacCartpoleBatch(CartpoleBatch):
    """Cartpoles [policies, environments] that PhysX advances."""

    def __init__(self, cartpole: Cartpole, keys: Int[Tensor, " policies"], environments: int) -> None:
        super().__init__(cartpole, keys, environments)
        self.gym = gymapi.acquire_gym()
        self.sim = self._simulation(keys.device)
        self._populate(len(keys) * environments)
        self.gym.prepare_sim(self.sim)
        self.dofs = gymtorch.wrap_tensor(self.gym.acquire_dof_state_tensor(self.sim)).view(*self.shape, 2, 2)

    def advance(self, action: Float[Tensor, "policies environments"]) -> State:
        self._write()
        forces = torch.zeros(*self.shape, 2, device=self.keys.device)
        forces[..., 0] = action.clamp(-1, 1) * self.cartpole.max_force
        self.gym.set_dof_actuation_force_tensor(self.sim, gymtorch.unwrap_tensor(forces))
        self.gym.simulate(self.sim)
        self.gym.fetch_results(self.sim, True)
        self.gym.refresh_dof_state_tensor(self.sim)
        return self.dofs.flatten(2).permute(2, 0, 1).clone()

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        raise NotImplementedError("a simulation keeps all of its environments; score policies with CartpoleBatch")

    def close(self) -> None:
        self.gym.destroy_sim(self.sim)

    def _write(self) -> None:
        """Give the simulation our state, which resets have changed."""
        self.dofs.copy_(self.state.permute(1, 2, 0).unflatten(2, (2, 2)))
        self.gym.set_dof_state_tensor(self.sim, gymtorch.unwrap_tensor(self.dofs))

    def _simulation(self, device: torch.device) -> gymapi.Sim:
        params = gymapi.SimParams()
        params.dt, params.substeps, params.up_axis = self.cartpole.dt, self.cartpole.substeps, gymapi.UP_AXIS_Z
        params.gravity = gymapi.Vec3(0.0, 0.0, -self.cartpole.gravity)
        params.use_gpu_pipeline = params.physx.use_gpu = device.type == "cuda"
        return self.gym.create_sim(device.index or 0, -1, gymapi.SIM_PHYSX, params)

    def _populate(self, count: int) -> None:
        options = gymapi.AssetOptions()
        options.fix_base_link = True
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "cartpole.urdf").write_text(urdf(self.cartpole))
            asset = self.gym.load_asset(self.sim, folder, "cartpole.urdf", options)
        low, high, pose = gymapi.Vec3(-4.0, -1.0, 0.0), gymapi.Vec3(4.0, 1.0, 4.0), gymapi.Transform()
        pose.p = gymapi.Vec3(0.0, 0.0, 2.0)
        for i in range(count):
            environment = self.gym.create_env(self.sim, low, high, max(1, int(count**0.5)))
            actor = self.gym.create_actor(environment, asset, pose, "cartpole", i, 1, 0)
            properties = self.gym.get_actor_dof_properties(environment, actor)
            properties["driveMode"][0], properties["driveMode"][1] = gymapi.DOF_MODE_EFFORT, gymapi.DOF_MODE_NONE
            properties["stiffness"][:] = 0.0
            properties["damping"][:] = (self.cartpole.cart_damping, self.cartpole.pole_damping)
            self.gym.set_actor_dof_properties(environment, actor, properties)
