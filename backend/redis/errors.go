package redis

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"

	goredis "github.com/redis/go-redis/v9"

	"github.com/dchannel/dchannel"
)

// mapError says what a client's error means. written tells whether the command
// changes something and may have reached the server; it does not matter for an
// error that the server itself has answered with.
func mapError(err error, written bool) error {
	var answer goredis.Error
	var op *net.OpError
	switch {
	case err == nil, errors.Is(err, dchannel.ErrInvalidOption):
		return err
	case errors.As(err, &answer):
		return fmt.Errorf("%w: %w", answerKind(answer.Error()), err)
	case written:
		return fmt.Errorf("%w: %w", dchannel.ErrUncertain, err)
	case errors.As(err, &op): // a dial that timed out is a context.DeadlineExceeded, but not the caller's
		return fmt.Errorf("%w: %w", dchannel.ErrUnavailable, err)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded), errors.Is(err, dchannel.ErrBackendClosed):
		return err
	default:
		return fmt.Errorf("%w: %w", dchannel.ErrUnavailable, err)
	}
}

// passing are the beginnings of answers that mean: not now. Everything else that a
// server answers is a refusal, which repeating does not change: WRONGPASS, NOAUTH,
// NOPERM, READONLY, OOM, MISCONF, WRONGTYPE, and what a script says.
var passing = []string{
	"LOADING", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "NOREPLICAS", "BUSY", "MOVED", "ASK",
	"ERR max number of clients reached",
}

func answerKind(text string) error {
	for _, p := range passing {
		if strings.HasPrefix(text, p) {
			return dchannel.ErrUnavailable
		}
	}
	if strings.Contains(text, "invalid bulk length") || strings.Contains(text, "exceeds maximum allowed size") {
		return dchannel.ErrTooLarge
	}
	return dchannel.ErrRefused
}

// harmless turns the uncertainty of a command that can be repeated at will into what
// it is for a reader: no answer.
func harmless(err error) error {
	switch {
	case !errors.Is(err, dchannel.ErrUncertain):
		return err
	case errors.Is(err, context.Canceled):
		return context.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		return context.DeadlineExceeded
	case errors.Is(err, dchannel.ErrBackendClosed):
		return dchannel.ErrBackendClosed
	}
	return fmt.Errorf("%w: no answer", dchannel.ErrUnavailable)
}
