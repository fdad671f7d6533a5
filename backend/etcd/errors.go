package etcd

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dchannel/dchannel"
)

// mapError puts the sentinel that says what became of a call before err, the client's error. For
// a write that may have reached the server, everything that is not known to come from before the
// server proposed it is uncertain. ctx is that of the call.
func mapError(ctx context.Context, err error, write bool) error {
	if err == nil {
		return nil
	}
	unknown := dchannel.ErrUnavailable
	if write {
		unknown = dchannel.ErrUncertain
	}
	if ctx.Err() != nil {
		if write {
			return fmt.Errorf("%w: %w", dchannel.ErrUncertain, ended(ctx))
		}
		return ended(ctx)
	}
	if sentinel := classify(err); sentinel != nil {
		return fmt.Errorf("%w: %w", sentinel, err)
	}
	return fmt.Errorf("%w: %w", unknown, err)
}

// classify returns the sentinel for what surely did not happen, nil for what may have. etcd proposes
// nothing after one of these (server/etcdserver/v3_server.go, api/v3rpc/interceptor.go).
func classify(err error) error {
	if _, desc, ok := strings.Cut(err.Error(), " desc = "); ok && status.Code(err) == codes.Unknown {
		err = errors.New(desc) // why a watch was cancelled comes as text
	}
	err = rpctypes.Error(err)
	switch {
	case errors.Is(err, rpctypes.ErrNoLeader), errors.Is(err, rpctypes.ErrTooManyRequests),
		errors.Is(err, rpctypes.ErrNotLeader), errors.Is(err, rpctypes.ErrAuthOldRevision),
		errors.Is(err, rpctypes.ErrLeaseNotFound):
		return dchannel.ErrUnavailable
	case errors.Is(err, rpctypes.ErrRequestTooLarge):
		return dchannel.ErrTooLarge
	}
	var known rpctypes.EtcdError
	code := status.Code(err)
	if errors.As(err, &known) {
		code = known.Code()
	}
	switch code {
	case codes.InvalidArgument, codes.PermissionDenied, codes.Unauthenticated, codes.FailedPrecondition, codes.Unimplemented:
		return dchannel.ErrRefused
	case codes.ResourceExhausted:
		// Either side's gRPC limit; the rest is the server's full database.
		if strings.Contains(err.Error(), "larger than max") {
			return dchannel.ErrTooLarge
		}
		return dchannel.ErrRefused
	}
	return nil
}

// unsent is the error of a write that ended with its context before it was sent.
func unsent(ctx context.Context, why string) error {
	return fmt.Errorf("%w: %s: %w", dchannel.ErrUnavailable, why, ended(ctx))
}

// ended is why ctx is over: the backend was closed, or the caller's own error.
func ended(ctx context.Context) error {
	if cause := context.Cause(ctx); errors.Is(cause, dchannel.ErrBackendClosed) {
		return dchannel.ErrBackendClosed
	}
	return ctx.Err()
}
