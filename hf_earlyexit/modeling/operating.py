"""When rows leave: a default policy, and others to choose from by name at call time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from ..calibration.result import CalibrationResult
from ..errors import EarlyExitConfigError, UsageError
from ..policies import ExitPolicy
from ..registry import unknown_name
from ..signals import SIGNALS, known_signals, signals_of
from ..values import check_flags, unexpected
from .certificate import Fingerprints, certify
from .configuration import DEFAULT, EXACT
from .protocol import ExitModel


class OperatingPoints:
    """Part of every model with exits; all of it lives in the config."""

    config: Any
    training: bool

    @property
    def exit_policy(self) -> ExitPolicy | None:
        """The policy that decides when rows leave, or `None`; it lives in `config.exit_policy`."""
        values = self.config.exit_policy
        return None if values is None else ExitPolicy.from_dict(values)

    def set_exit_policy(self, policy: ExitPolicy | CalibrationResult | None) -> None:
        """Serve with this policy from now on; `None` runs the model in full.

        Args:
            policy: a calibration result, which must be of this model: that is checked again at every load. Or a bare
                policy, for which nothing vouches.

        Raises:
            EarlyExitConfigError: for a policy made for other exits or another problem type.
            CheckpointError: for a calibration of another model.
        """
        values, certificate = (None, None) if policy is None else self._accept(policy, Fingerprints(self))  # type: ignore[arg-type]
        self.config.exit_policy, self.config.exit_certificate = values, certificate

    def set_operating_points(
        self,
        points: Mapping[str, ExitPolicy | CalibrationResult] | None,
        default: str | None = None,
        *,
        keep_others: bool = False,
    ) -> None:
        """Keep several policies, to be chosen by name at call time; "exact", the full model, is always among them.

        Args:
            points: calibration results or policies by name; they take the place of all former points.
            default: the point that becomes `exit_policy`; `None` leaves that as it is.
            keep_others: former points of other names stay, with their certificates.

        Raises:
            UnknownNameError: for a default that is none of the points.
            UsageError: for points that do not come by name.
            EarlyExitConfigError, CheckpointError: as in `set_exit_policy`, or for the names "exact" and "default".
        """
        if points is not None and not isinstance(points, Mapping):
            raise unexpected("points", points, "policies or calibration results by name")
        points = dict(points or {})
        if DEFAULT in points:  # a config that has it still loads
            raise EarlyExitConfigError(
                f"exit_operating_points has the name {DEFAULT!r}, which stands for the policy that serves without a name; "
                "choose another.",
                field="exit_operating_points",
                value=DEFAULT,
            )
        if default is not None and default not in (EXACT, *points):
            raise unknown_name("operating point", default, (EXACT, *points))
        fingerprints = Fingerprints(self)  # type: ignore[arg-type]  # what it lacks comes with the stock class
        accepted = {name: self._accept(source, fingerprints, name) for name, source in points.items()}
        policies = {name: values for name, (values, _) in accepted.items()}
        certificates = {name: certificate for name, (_, certificate) in accepted.items() if certificate is not None}
        if keep_others:
            policies = (self.config.exit_operating_points or {}) | policies
            former = self.config.exit_point_certificates or {}
            certificates |= {name: certificate for name, certificate in former.items() if name not in accepted}
        self.config.exit_operating_points = policies or None
        self.config.exit_point_certificates = certificates or None
        if default is not None:
            self.config.exit_policy, self.config.exit_certificate = accepted.get(default, (None, None))

    @property
    def operating_points(self) -> tuple[str, ...]:
        """Names that `operating_point` may take."""
        return (EXACT, *(self.config.exit_operating_points or {}))

    def policy_at(self, operating_point: str | None) -> ExitPolicy | None:
        """The policy of an operating point, `None` for "exact"; without a name, `exit_policy`.

        Raises:
            UnknownNameError: with the nearest name and the whole list.
        """
        if operating_point is None:
            return self.exit_policy
        if not isinstance(operating_point, str) or operating_point not in self.operating_points:
            raise unknown_name("operating point", operating_point, self.operating_points)
        return None if operating_point == EXACT else ExitPolicy.from_dict(self.config.exit_operating_points[operating_point])

    def choose_policy(
        self, early_exit: bool | None, operating_point: str | None, kwargs: dict[str, Any]
    ) -> ExitPolicy | None:
        """The policy that a call asks for; `None` to run in full.

        Args:
            early_exit, operating_point: as in the model's `forward`.
            kwargs: the call's other arguments.

        Raises:
            UsageError: for arguments that contradict each other, or early exit where it cannot be.
            UnknownNameError: for an unknown operating point.
        """
        check_flags(early_exit=early_exit)
        policy = self.policy_at(operating_point)
        if operating_point is not None:
            if early_exit is not None and early_exit != (policy is not None):
                raise UsageError(
                    f"early_exit={early_exit} contradicts operating_point={operating_point!r}; give one of the two.",
                    field="operating_point",
                    value=operating_point,
                )
            early_exit = policy is not None
        if early_exit is False or (early_exit is None and (self.training or policy is None)):
            return None
        if policy is None:
            raise UsageError(
                "early_exit=True, but no policy is set; calibrate first and call `model.set_exit_policy(result.policy)`.",
                field="early_exit",
            )
        if self.training:
            raise UsageError("Early exit asked for in training mode, which needs every exit. Call model.eval() first.")
        for flag in ("output_hidden_states", "output_attentions"):
            if kwargs.get(flag, getattr(self.config, flag, False)):
                if not policy.may_leave:
                    return None  # it changes nothing, and the full model gives them
                raise UsageError(
                    f"{flag} with early exit would give tensors of a different batch at every layer; pass early_exit=False.",
                    field=flag,
                )
        return policy

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the signals that the exits can give beside their logits."""
        return signals_of(self.config)

    def signals_for(self, names: Sequence[str] | None, policy: ExitPolicy | None) -> tuple[str, ...]:
        """The signals that a full pass gives.

        Args:
            names: as the call asks for them; `None` for those that are learned, and for none with early exit.
            policy: of the call; `None` where all exits run.

        Raises:
            UsageError: for signals asked for with early exit, where most exits are never reached, or that the model lacks.
            UnknownNameError: for an unknown signal.
        """
        if names is None and policy is not None:
            return ()
        if names is None:
            return tuple(name for name in self.signals if SIGNALS.get(name).learned)
        if policy is not None:
            raise UsageError(
                "exit_signals are told where every exit runs; pass early_exit=False with them, or leave them out.",
                field="exit_signals",
                value=names,
            )
        self.require_signals(known_signals(names))
        return tuple(names)

    def require_signals(self, names: Iterable[str]) -> None:
        """Refuse signals that the model does not give.

        Raises:
            UsageError: naming the first, and what to do.
        """
        for name in names:
            if name not in self.signals:
                signal = SIGNALS.get(name)
                raise UsageError(
                    f"The exits of this model give no {signal.words} ({name!r}): {signal.cure}.",
                    field="exit_signals",
                    value=name,
                )

    def _accept(
        self, source: ExitPolicy | CalibrationResult, fingerprints: Fingerprints, name: str | None = None
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """A policy as the config holds it, and its certificate."""
        policy = source.policy if isinstance(source, CalibrationResult) else source
        if not isinstance(policy, ExitPolicy):
            raise unexpected("policy", policy, "an ExitPolicy or what `calibrate` returned")
        if name is None:
            self.config.check_policy(policy)
        else:
            self.config.check_operating_point(name, policy)
        if not isinstance(source, CalibrationResult):
            return policy.to_dict(), None
        return policy.to_dict(), certify(source, cast(ExitModel, self), fingerprints, name)
